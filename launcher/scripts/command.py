"""``evermesh launch SCRIPT``: from the command line to the exit code. Imports little, so that ranks start soon."""

import os
from collections.abc import Sequence

from evermesh.launcher.scripts.flags import script_help, wants_help


def launch_script(arguments: Sequence[str]) -> int:
    """Run the script that ``arguments`` describe and return the exit code of the command.

    Raises:
        ScriptRefused: they describe none; nothing was started.
        OSError: logs cannot be written, or a program cannot be executed; nothing is left running.
    """
    if wants_help(arguments):
        print(script_help())
        return 0
    from evermesh.launcher.scripts.options import script_job
    from evermesh.launcher.scripts.output import Terminal
    from evermesh.launcher.scripts.supervisor import Supervisor

    return Supervisor(script_job(arguments, os.environ), os.environ, Terminal()).run()
