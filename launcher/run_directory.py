"""The directory of a run: its configuration, its state, its lock, its logs and what the trainer writes.

runs/NAME/  job.yaml         the resolved configuration
            state.json       RunState
            run.lock         held (flock) by the living controller
            controller.json, token    how the controller is reached
            prometheus.json  where it and its agents serve numbers, as Prometheus reads it (file_sd)
            faults.json     what is injected into the run, where it was launched by ``evermesh chaos``
            journal.jsonl    what the controller did and why; journal.sqlite is its index
            members.json     who takes part in the succession of the controller, with three or more nodes
            logs/            rank-N.log: what worker N printed; rank-N.stacks: what it was doing when that was asked
            telemetry.jsonl, events.jsonl, checkpoints/, loss.png
            trackers/        how far each experiment tracker is; tensorboard/, wandb/: what they wrote
"""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from evermesh.checkpoint.stores.places import Place
from evermesh.fault.cluster.store import cluster_place
from evermesh.launcher.config import JobConfig
from evermesh.launcher.errors import JobFileInvalid, RunAlive, RunNotFound, RunUnusable
from evermesh.launcher.job_file import load_job, write_job

_LOCK_WAIT_S = 0.5
"""How long a lock is asked for: whoever looks whether a run lives holds it for an instant."""

_NAMED_RUNS = 8
"""Runs that an error lists."""


class RunState(BaseModel):
    """What became of a run, as its launcher last wrote it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: Literal["created", "running", "finished", "stopped", "failed"]
    pid: PositiveInt | None = None
    """Process of the controller; only for messages, the lock says whether it lives."""
    workers: PositiveInt
    attempt: NonNegativeInt = 0
    """Lives of the worker group so far."""
    started: datetime | None = None
    """When the last attempt started."""
    ended: datetime | None = None
    error: str | None = None
    """What went wrong, with the way out."""
    traceback: str | None = None
    """Of the rank that failed first."""
    exit_code: int | None = None
    """What ``evermesh launch`` ends with; None while it runs."""


def is_held(lock: Path) -> bool:
    """Whether a living process holds this lock (flock) alone."""
    if not lock.is_file():
        return False
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@dataclass(frozen=True, slots=True)
class Run:
    """One run on disk."""

    directory: Path

    @classmethod
    def create(cls, config: JobConfig) -> Self:
        """Make the directory for a new run: NAME, or NAME-2, NAME-3, ... where that is taken.

        Raises:
            RunUnusable: it cannot be made or written; nothing is left of it.
        """
        try:
            run = cls(_new_directory(config.runs, config.name))
        except OSError as error:
            raise _unusable(config.runs, error) from error
        try:
            run.logs.mkdir()
            settled = {"name": run.name, "cluster": str(cluster_place(config.cluster))}
            run.write_config(config.model_copy(update=settled))
            run.write_state(RunState(state="created", workers=config.workers))
        except OSError as error:
            shutil.rmtree(run.directory, ignore_errors=True)
            raise _unusable(config.runs, error) from error
        return run

    @classmethod
    def open(cls, directory: Path) -> Self:
        """The run in ``directory``.

        Raises:
            RunNotFound: there is none.
        """
        if not (directory / "state.json").is_file():
            raise RunNotFound(f"{directory} holds no run (no state.json). `evermesh runs` lists the runs there are.")
        return cls(directory)

    @classmethod
    def all(cls, runs: Path) -> list[Self]:
        """The runs in the folder ``runs``, oldest first."""
        found = [cls(path.parent) for path in runs.glob("*/state.json")]
        return sorted(found, key=lambda run: (run._started(), run.name))

    @classmethod
    def latest(cls, runs: Path) -> Self:
        """The run of the folder ``runs`` that was started last.

        Raises:
            RunNotFound: there is none.
        """
        found = cls.all(runs)
        if not found:
            raise RunNotFound(
                f"there is no run in the folder {runs} (looked from {Path.cwd()}). Start one with `evermesh launch`, or "
                "say where the runs are with --runs."
            )
        return found[-1]

    @classmethod
    def find(cls, name: str | None, runs: Path) -> Self:
        """The run with this name in ``runs``, or at this path; without a name the latest.

        Raises:
            RunNotFound: there is none; names the runs there are.
        """
        if name is None:
            return cls.latest(runs)
        for directory in (runs / name, Path(name)):
            if (directory / "state.json").is_file():
                return cls(directory)
        names = [run.name for run in cls.all(runs)]
        older = f" and {len(names) - _NAMED_RUNS} older" if len(names) > _NAMED_RUNS else ""
        known = f"{', '.join(names[-_NAMED_RUNS:]) or 'none'}{older}"
        raise RunNotFound(
            f"there is no run {name} in the folder {runs}, nor a directory of that name with a run in it (looked from "
            f"{Path.cwd()}). Runs in {runs}: {known}."
        )

    @property
    def name(self) -> str:
        """The run's name."""
        return self.directory.name

    @property
    def logs(self) -> Path:
        """Folder of the workers' output."""
        return self.directory / "logs"

    @property
    def telemetry(self) -> Path:
        """One line per step."""
        return self.directory / "telemetry.jsonl"

    @property
    def events(self) -> Path:
        """What happened besides steps."""
        return self.directory / "events.jsonl"

    @property
    def checkpoints(self) -> Place:
        """Folder of the checkpoints, in an object store perhaps."""
        try:
            return self.config().train.checkpoint.directory(self.directory)
        except (RunNotFound, JobFileInvalid):  # whoever trains it refuses; what lies here can be looked at all the same
            return self.directory / "checkpoints"

    @property
    def journal(self) -> Path:
        """What the controller did, one entry per line."""
        return self.directory / "journal.jsonl"

    @property
    def loss_png(self) -> Path:
        """Picture of the loss."""
        return self.directory / "loss.png"

    def _started(self) -> float:
        try:
            started = self.state().started
        except RunNotFound:  # a damaged run is no reason not to list the others
            return 0.0
        return started.timestamp() if started else 0.0

    def config(self) -> JobConfig:
        """The configuration of the last attempt.

        Raises:
            RunNotFound: it is gone.
            JobFileInvalid: it was changed, and breaks a rule now.
        """
        if not (self.directory / "job.yaml").is_file():
            raise RunNotFound(
                f"run {self.name} has lost its job.yaml. Put one back in {self.directory}, or start anew."
            )
        return load_job(self.directory / "job.yaml")

    def write_config(self, config: JobConfig) -> None:
        """Replace the configuration."""
        write_job(config, self.directory / "job.yaml.new")
        os.replace(self.directory / "job.yaml.new", self.directory / "job.yaml")

    def state(self) -> RunState:
        """The state as last written; see ``status`` for whether it still holds.

        Raises:
            RunNotFound: the file is damaged or of another version.
        """
        path = self.directory / "state.json"
        try:
            return RunState.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise RunNotFound(
                f"{path} is not the state of a run: {error.errors()[0]['msg']}. To go on from its checkpoints write into "
                f'it: {{"state": "stopped", "workers": 1}}; otherwise move {path.parent} away.'
            ) from error

    def write_state(self, state: RunState) -> None:
        """Replace the state; a reader sees the old one or the new one. A full disk has room for it all the same."""
        path, new = self.directory / "state.json", self.directory / "state.json.new"
        content = state.model_dump_json(indent=1).encode() + b"\n"
        try:
            new.write_bytes(content)
            os.replace(new, path)
        except OSError as error:
            new.unlink(missing_ok=True)
            if error.errno != errno.ENOSPC or not path.is_file():
                raise
            with path.open("r+b") as file:  # into the block that the old one has
                file.write(content)
                file.truncate()

    def status(self) -> str:
        """The state, or "died" where it says running but no controller lives."""
        state = self.state().state
        return "died" if state == "running" and not self.is_alive() else state

    def is_alive(self) -> bool:
        """Whether a controller holds the lock now."""
        return is_held(self.directory / "run.lock")

    @contextmanager
    def locked(self) -> Iterator[Callable[[], None]]:
        """Hold the run's lock; the kernel gives it back however this process ends.

        Gives a function that raises RunAlive if a controller that was elected has put its own lock there since.

        Raises:
            RunAlive: another controller holds it.
        """
        with (self.directory / "run.lock").open("a") as file:
            until = time.monotonic() + _LOCK_WAIT_S
            while not (_lock(file.fileno()) and _is_at(file.fileno(), self.directory / "run.lock")):
                if time.monotonic() > until:
                    raise RunAlive(self.directory, self.state().pid)
                time.sleep(0.05)
            yield lambda: self._check_lock(file.fileno())

    def _check_lock(self, descriptor: int) -> None:
        if not _is_at(descriptor, self.directory / "run.lock"):
            raise RunAlive(self.directory, self.state().pid)

    @contextmanager
    def taken_over(self) -> Iterator[None]:
        """Hold a lock of one's own in the place of that of a controller that is fenced off, but may hold its own for long."""
        new = self.directory / "run.lock.new"
        with new.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.replace(new, self.directory / "run.lock")
            yield


def now() -> datetime:
    """The time for ``RunState``, UTC."""
    return datetime.now(UTC)


def _new_directory(runs: Path, name: str) -> Path:
    runs.mkdir(parents=True, exist_ok=True)
    directory, number = runs / name, 1
    while not _made(directory):
        number += 1
        directory = runs / f"{name}-{number}"
    return directory


def _unusable(runs: Path, error: OSError) -> RunUnusable:
    return RunUnusable(
        f"no run can be made in {runs.absolute()}: {error.strerror or error}. Give another folder with --set runs=DIR, "
        "or see to its permissions and its free space."
    )


def _made(directory: Path) -> bool:
    try:
        directory.mkdir()
    except FileExistsError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether ``path`` is still this open file: another controller may have put its own there."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
