"""The job step in which the agent of one node runs: how it is asked for, and what runs in it.

``python -m evermesh.launcher.placement.slurm_step SPEC TOWARDS DIGEST``. Every forked worker imports this module again, under
another name: it must load nothing by itself. The code must be installed on every node, and the directory of the run must be
on storage that all of them see.
"""

import hashlib
import hmac
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evermesh.launcher.agent.spec import AgentSpec

SRUN_FAILED = 84
"""With what srun ends if Slurm itself refuses the step."""
_MODULE = "evermesh.launcher.placement.slurm_step"
_OF_THE_JOB = ("SLURM_CONF", "SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT")
"""What is passed on; srun would take the other variables of the batch script, or of a step, for options."""


def step_command(job: str, host: str, name: str, spec: "AgentSpec", towards: str, token: str) -> list[str]:
    """What starts the step of one node. Everybody may read a command line: it has a digest of the ``token`` only."""
    return [
        "srun",
        f"--jobid={job}",
        "--overlap",  # with other steps of the job, also one that is not quite gone
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={host}",
        "--kill-on-bad-exit=0",
        "--mem=0",  # all that the job has there
        "--cpu-bind=none",  # workers share the CPUs of the node, one task is not one CPU
        "--mpi=none",
        f"--job-name={name}",
        *(sys.executable, "-m", _MODULE, spec.model_dump_json(), towards, digest_of(token)),
    ]


def step_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of srun, which the agent inherits; the rack of the batch host is not that of others."""
    dropped = ("SLURM_", "SRUN_", "EVERMESH_RACK")
    kept = {name: value for name, value in environ.items() if not name.startswith(dropped)}
    return (
        kept | {name: environ[name] for name in _OF_THE_JOB if name in environ} | {"SLURM_EXIT_ERROR": str(SRUN_FAILED)}
    )


def digest_of(token: str) -> str:
    """By which an agent knows the token of the run, and nobody can tell it."""
    return hashlib.sha256(b"run\0" + token.encode()).hexdigest()


def main() -> None:
    """Run the agent of this node until it is told to leave."""
    from evermesh.launcher.agent.agent import Agent
    from evermesh.launcher.agent.spec import AgentSpec
    from evermesh.launcher.errors import LauncherError
    from evermesh.launcher.patient_output import outlive_a_full_disk
    from evermesh.launcher.placement.slurm_allocation import address_towards

    os.environ.pop("SLURM_EXIT_ERROR", None)
    outlive_a_full_disk()
    spec, towards, digest = AgentSpec.model_validate_json(sys.argv[1]), sys.argv[2], sys.argv[3]
    try:
        token = _token(spec.run, digest)
        _print_into(spec.run / "logs" / f"agent-{spec.node}.log")
        Agent(spec.model_copy(update={"address": address_towards(towards)}), token).run()
    except LauncherError as error:  # its last words are what the controller tells
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _token(run: Path, digest: str) -> str:
    """The token of the run, if this node sees the same directory as the controller.

    Raises:
        RunNotSeen: it does not.
    """
    import socket

    from evermesh.launcher.contact import read_token
    from evermesh.launcher.errors import RunNotSeen

    try:
        token = read_token(run)
    except OSError:
        token = ""
    if not hmac.compare_digest(digest_of(token), digest):
        raise RunNotSeen(
            f"{socket.gethostname()}, a node of the Slurm job, does not see {run} as the controller does. Put the runs on "
            "storage that every node mounts at the same path: --set runs=DIR."
        )
    return token


def _print_into(log: Path) -> None:
    """Send the output of this process, and of those it starts, to ``log`` itself: srun may be gone before it."""
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


if __name__ == "__main__":
    main()
