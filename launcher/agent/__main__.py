"""``python -m evermesh.launcher.agent SPEC``: an agent as a process of this machine.

Every forked worker imports this module again, under another name: it must load nothing by itself.
"""

import os
import sys


def main() -> None:
    """Run the agent; the token is taken out of the environment, workers have no business with the controller."""
    from evermesh.launcher.agent.agent import Agent
    from evermesh.launcher.agent.spec import AgentSpec
    from evermesh.launcher.errors import LauncherError
    from evermesh.launcher.patient_output import outlive_a_full_disk
    from evermesh.launcher.processes import TOKEN_VARIABLE

    outlive_a_full_disk()
    try:
        Agent(AgentSpec.model_validate_json(sys.argv[1]), os.environ.pop(TOKEN_VARIABLE)).run()
    except LauncherError as error:  # its last words are what the controller tells
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
