"""The Slurm allocation that a process belongs to, by its variables and by Slurm's own commands."""

import os
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evermesh.launcher.errors import AllocationMissing, SlurmSilent

_COMMAND_WAIT_S = 20.0
_ANY_PORT = 9
"""Nothing is sent there: the kernel only chooses a way to it."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """Nodes that Slurm has given to a job for a while."""

    cluster: str
    job: str
    hosts: tuple[str, ...]
    """Slurm's names of the nodes."""
    here: str | None
    """The node on which this process runs; None: it runs on none of them, as after ``salloc``."""
    starts_before: int
    """How often the job was started before, and put back into the queue."""

    @classmethod
    def current(cls, environ: Mapping[str, str] = os.environ) -> "Allocation":
        """The allocation in which this process was started.

        Raises:
            AllocationMissing: there is none.
            SlurmSilent: Slurm's commands are not there, or fail.
        """
        job = environ.get("SLURM_JOB_ID")
        if job is None:
            raise AllocationMissing(
                "--on slurm is for inside of an allocation, and SLURM_JOB_ID is not set. Put `exec evermesh launch JOB.yaml "
                "--on slurm` into a script for sbatch (`evermesh deploy slurm JOB.yaml` writes one), or call it under salloc."
            )
        found = call("scontrol", "show", "hostnames", environ.get("SLURM_JOB_NODELIST", ""))
        here = environ.get("SLURMD_NODENAME")
        return cls(
            cluster=environ.get("SLURM_CLUSTER_NAME", ""),
            job=job,
            hosts=tuple(found.split()),
            here=here if here in found.split() else None,
            starts_before=int(environ.get("SLURM_RESTART_COUNT", "0")),
        )

    @property
    def address(self) -> str:
        """The address of this machine that the nodes of the allocation reach."""
        others = [host for host in self.hosts if host != self.here]
        if not others:
            return "127.0.0.1"
        told = call("scontrol", "--oneliner", "show", "node", others[0])
        found = re.search(r"\bNodeAddr=(\S+)", told)
        return address_towards(found[1] if found else others[0])

    def time_left_s(self) -> float | None:
        """Seconds until the time limit; None: there is none. It may be moved at any time.

        Raises:
            SlurmSilent: nobody knows.
        """
        return seconds(call("squeue", "--noheader", "--jobs", self.job, "--format", "%L").strip())

    def is_running(self) -> bool:
        """Whether the job runs, and nobody has ended or cancelled it. Raises SlurmSilent."""
        return call("squeue", "--noheader", "--jobs", self.job, "--format", "%T").strip() == "RUNNING"

    def steps(self) -> dict[str, list[str]]:
        """The steps of the job by their names. Raises SlurmSilent."""
        found: dict[str, list[str]] = {}
        for line in call("squeue", "--noheader", "--steps", "--jobs", self.job, "--format", "%i %j").splitlines():
            step, _, name = line.strip().partition(" ")
            if step.startswith(f"{self.job}."):
                found.setdefault(name, []).append(step)
        return found

    def end_step(self, step: str) -> None:
        """Kill everything of a step. Raises SlurmSilent."""
        call("scancel", "--signal=KILL", step)

    def requeue(self) -> None:
        """Put the job back into the queue: Slurm ends what is left of it, this process too. Raises SlurmSilent."""
        call("scontrol", "requeue", self.job)


def address_towards(host: str) -> str:
    """The address of this machine by which it reaches ``host``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
        way.connect((host, _ANY_PORT))
        return str(way.getsockname()[0])


def seconds(text: str) -> float | None:
    """What Slurm writes as ``1-02:03:04``, ``02:03:04`` or ``03:04``; None for ``UNLIMITED`` and what is no time."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return float(86400 * days + 3600 * hours + 60 * minutes + rest)


def call(*command: str) -> str:
    """What a command of Slurm prints.

    Raises:
        SlurmSilent: it is not installed, fails, or takes too long.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMMAND_WAIT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmSilent(f"`{command[0]}` gave no answer: {error}. Is this a machine of the Slurm cluster?") from error
    if done.returncode != 0:
        raise SlurmSilent(f"`{' '.join(command)}` ended with {done.returncode}: {_last(done.stderr)}")
    return done.stdout


def _last(text: str) -> str:
    lines: Sequence[str] = text.strip().splitlines() or ["without a word"]
    return lines[-1]
