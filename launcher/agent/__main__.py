"""``python -m evermesh.launcher.agent SPEC``: an agent as a process of this machine.

Every forked worker imports this module again, under another name: it must load nothing by itself.
"""

import sys


def main() -> None:
    """Run the agent. It reads the token where the run is: arguments and environment of a process others may see."""
    from evermesh.launcher.agent.agent import Agent
    from evermesh.launcher.agent.spec import AgentSpec
    from evermesh.launcher.contact import read_token
    from evermesh.launcher.errors import LauncherError
    from evermesh.launcher.patient_output import outlive_a_full_disk

    outlive_a_full_disk()
    try:
        spec = AgentSpec.model_validate_json(sys.argv[1])
        Agent(spec, read_token(spec.run)).run()
    except LauncherError as error:  # its last words are what the controller tells
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
