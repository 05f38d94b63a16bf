"""Finding a job that somebody started: by name, by directory, or because it is the one that lives."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evermesh.launcher import registry
from evermesh.launcher.errors import JobAmbiguous, RunNotFound
from evermesh.launcher.run_directory import Run


@dataclass(frozen=True, slots=True)
class FoundJob:
    """A job and where its files are."""

    name: str
    directory: Path
    run: Run | None
    """The run; None for a script."""
    pid: int | None
    """Of the controller, or of the supervisor of a script; None: it does not live."""
    started_s: float | None = None
    """Wall clock, seconds since 1970."""
    command: tuple[str, ...] = ()

    def as_row(self) -> dict[str, Any]:
        """For JSON."""
        kind = "run" if self.run else "script"
        return {
            "kind": kind,
            "name": self.name,
            "directory": str(self.directory),
            "pid": self.pid,
            "started_s": self.started_s,
        }


def living_jobs() -> list[FoundJob]:
    """Every job of this user on this machine that lives, oldest first."""
    return [
        FoundJob(
            entry.name,
            Path(entry.directory),
            Run(Path(entry.directory)) if entry.kind == "run" else None,
            entry.pid,
            entry.started_s,
            tuple(entry.command),
        )
        for entry in sorted(registry.living(), key=lambda entry: entry.started_s)
    ]


def find_job(name: str | None, runs: Path, living: Sequence[FoundJob] | None = None) -> FoundJob:
    """The living job of this name or directory, else the run of this name; without a name the only one that lives, else
    the latest run.

    Raises:
        JobAmbiguous: several live and no name says which, or several have the name.
        RunNotFound: there is none.
    """
    living = living_jobs() if living is None else living
    wanted = [job for job in living if name is None or name in (job.name, str(job.pid)) or _is(job.directory, name)]
    if len(wanted) > 1:
        known = "\n".join(f"  {job.name}  {job.directory}" for job in wanted)
        raise JobAmbiguous(f"{len(wanted)} jobs could be meant. Give the directory of one:\n{known}")
    if wanted:
        return wanted[0]
    run = Run.find(name, runs)
    return FoundJob(run.name, run.directory, run, None)


def find_run(name: str | None, runs: Path) -> Run:
    """As ``find_job``, but a script will not do.

    Raises:
        RunNotFound: it is a script.
    """
    job = find_job(name, runs)
    if job.run is None:
        raise RunNotFound(
            f"{job.name} is a script: nothing but its output is known. Use: evermesh logs {job.directory}"
        )
    return job.run


def _is(directory: Path, name: str) -> bool:
    return Path(name).exists() and directory.exists() and Path(name).samefile(directory)
