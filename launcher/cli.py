"""The command line, ``evermesh``: how it begins and ends; what it can do is in ``commands``.

Exit codes: 0 done (or stopped at ``stop_at``), 1 failed, 2 a wrong request, 75 run it again later, 93 do not, 128 +
signal after Ctrl-C or SIGTERM. What is needed for some commands only is loaded late: a script's ranks wait for it.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from evermesh.launcher.errors import StoppedAtOnce
from evermesh.parallelism.errors import EvermeshError


def main() -> None:
    """Run the command line and end the process."""
    try:
        if os.environ.get("_EVERMESH_COMPLETE") in ("complete_bash", "complete_zsh", "complete_fish"):
            sys.exit(_answer_shell())
        if sys.argv[1:2] == ["launch"]:
            _launch(sys.argv[2:])
        _command_line()
    except EvermeshError as error:
        _show(error)
        sys.exit(getattr(error, "exit_code", 2))
    except OSError as error:  # a full disk, permissions: the machine's fault, as far as anyone can tell here
        _show(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _command_line() -> None:
    from evermesh.launcher.commands.app import app

    app()


def _answer_shell() -> int:
    """Say what may follow on a command line: a person waits for it at every key."""
    from evermesh.launcher.completion.answering import answer

    return answer()


def _launch(arguments: Sequence[str]) -> None:
    """Launch a script, whose flags are torchrun's; return where ``arguments`` are about a job file."""
    from evermesh.launcher.scripts import is_script, launch_script, script_help, wants_help

    if is_script(arguments):
        sys.exit(launch_script(arguments))
    if wants_help(arguments):
        with suppress(SystemExit):
            _command_line()
        print(script_help())
        sys.exit(0)


def _show(error: EvermeshError | OSError) -> None:
    """Print an expected error without our traceback. That of a worker comes last: it is where a bug shows."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True)
    word = "[yellow]stopped:[/]" if isinstance(error, StoppedAtOnce) else "[bold red]error:[/]"
    for text in (f"{word} {escape(str(error))}", *map(escape, getattr(error, "__notes__", ()))):
        console.print(text, highlight=False, soft_wrap=True)
    if traceback := getattr(error, "traceback", None):
        console.print(traceback.rstrip(), markup=False, highlight=False, soft_wrap=True)
