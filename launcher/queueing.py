"""Jobs that a queue starts, ends and starts again: on Slurm each start goes on with the run of the one before.

RUN/slurm.json tells for which batch job a run was made.
"""

import dataclasses
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from rich.console import Console

from evermesh import checkpoint
from evermesh.launcher.config import JobConfig
from evermesh.launcher.errors import LauncherError, SlurmSilent
from evermesh.launcher.following import JobResult
from evermesh.launcher.operations import Trained, launch_job, resume_job
from evermesh.launcher.placement.slurm_allocation import Allocation
from evermesh.launcher.policy import DO_NOT_REQUEUE, NO_PROGRESS_LIMIT, REQUEUE
from evermesh.launcher.run_directory import Run

_RECORD = "slurm.json"


class BatchRecord(BaseModel):
    """The batch job of a run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    cluster: str
    job: str
    name: str
    """The run's name as the job file has it."""
    step: NonNegativeInt = 0
    """Of the newest checkpoint when the run was last started."""
    idle_starts: NonNegativeInt = 0
    """Starts in a row before that one that left no newer checkpoint."""


def launch_queued(config: JobConfig, console: Console, *, detach: bool = False, goes_on: bool = False) -> Trained:
    """Launch the job; where Slurm has started this batch job before, go on with the run of that start.

    ``goes_on``: also with the newest run of the job's name, whoever launched it. If the job ends with 75 and wants it
    (``requeue``), its batch job is put back into the queue. Raises what ``launch_job`` and ``resume_job`` raise.
    """
    named = _named(config) if goes_on else None
    if config.on != "slurm":
        if named is None:
            return launch_job(config, console, detach=detach)
        return _finished(named, console) or _go_on(named, config, console, detach)
    allocation = Allocation.current()
    found = _find(config, allocation) if allocation.starts_before else None
    run = found[0] if found is not None else named
    record = BatchRecord(
        cluster=allocation.cluster, job=allocation.job, name=config.name, step=_newest(run) if run else 0
    )
    if found is not None:
        record = started_again(found[1], record.step)
    if run is not None and (finished := _finished(run, console)):
        return finished

    def train() -> Trained:
        if run is None or not _newest(run):
            return launch_job(config, console, detach=detach, prepare=lambda made: _write(made, record))
        _write(run, record)
        return _go_on(run, config, console, detach)

    return _requeued(config, allocation, console, train)


def resume_queued(
    run: Run, console: Console, *, workers: int | None = None, overrides: Sequence[str] = (), detach: bool = False
) -> Trained:
    """Resume ``run`` as ``resume_job`` does, and put the batch job back into the queue as ``launch_queued`` does."""

    def train() -> Trained:
        return resume_job(run, console, workers=workers, overrides=overrides, detach=detach)

    config = run.config()
    if config.on != "slurm" or "SLURM_JOB_ID" not in os.environ:
        return train()
    allocation = Allocation.current()
    before = _read(run.directory)
    if before is None or (before.cluster, before.job) != (allocation.cluster, allocation.job):
        before = BatchRecord(cluster=allocation.cluster, job=allocation.job, name=config.name, step=_newest(run))
    _write(run, started_again(before, _newest(run)) if allocation.starts_before else before)
    return _requeued(config, allocation, console, train)


def _go_on(run: Run, config: JobConfig, console: Console, detach: bool) -> Trained:
    """Resume a run as it was, to the same ``stop_at``."""
    stop_at = run.config().train.stop_at
    overrides = [f"on={config.on}", *([f"train.stop_at={stop_at}"] if stop_at is not None else [])]
    return resume_job(run, console, overrides=overrides, detach=detach)


def _finished(run: Run, console: Console) -> Trained | None:
    """A run of which nothing is left to do, and that no resume would take."""
    step, stop_at, state = _newest(run), run.config().train.stop_at, run.state().state
    if state != "finished" and (stop_at is None or step < stop_at):
        return None
    console.print(f"nothing is left to do of run {run.name}: it is at step {step}", highlight=False)
    return Trained(
        run, JobResult(step, "finished" if state == "finished" else "stop_at", checkpoint.latest(run.checkpoints), 0)
    )


def _requeued(config: JobConfig, allocation: Allocation, console: Console, train: Callable[[], Trained]) -> Trained:
    """Train, and see to the batch job if that ends with 75."""
    try:
        trained = train()
    except LauncherError as error:
        if error.exit_code == REQUEUE:
            text, error.exit_code = _back_into_queue(config, allocation)
            error.add_note(text)
        raise
    if trained.result.exit_code != REQUEUE:
        return trained
    text, code = _back_into_queue(config, allocation)
    console.print(text, highlight=False, soft_wrap=True)
    return Trained(trained.run, dataclasses.replace(trained.result, exit_code=code))


def _back_into_queue(config: JobConfig, allocation: Allocation) -> tuple[str, int]:
    """Put the batch job back into the queue if that is wanted and is of use; what was done, and the exit code."""
    job = f"Slurm job {allocation.job}"
    if not config.requeue:
        return f"{job} ends with {REQUEUE}; `requeue: true` in the job file would put it back into the queue", REQUEUE
    found = _find(config, allocation)
    if found is not None and _newest(found[0]) <= found[1].step and found[1].idle_starts + 1 >= NO_PROGRESS_LIMIT:
        return (
            f"{job} is not put back into the queue: {NO_PROGRESS_LIMIT} starts left no newer checkpoint",
            DO_NOT_REQUEUE,
        )
    try:
        if not allocation.is_running():
            return f"{job} is being ended already: whether it starts again is not for it to say", REQUEUE
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # with which Slurm ends what is left of a job that is put back
        allocation.requeue()
    except SlurmSilent as error:
        return f"{job} could not be put back into the queue: {error}", REQUEUE
    return f"{job} is back in the queue, and goes on from the newest checkpoint", REQUEUE


def started_again(before: BatchRecord, newest: int) -> BatchRecord:
    """The record of the next start, which finds ``newest`` as the step of the newest checkpoint."""
    idle_starts = 0 if newest > before.step else before.idle_starts + 1
    return before.model_copy(update={"step": newest, "idle_starts": idle_starts})


def _find(config: JobConfig, allocation: Allocation) -> tuple[Run, BatchRecord] | None:
    """The newest run of this batch job and this job file."""
    wanted = (allocation.cluster, allocation.job, config.name)
    for run in reversed(Run.all(config.runs)):
        record = _read(run.directory)
        if record is not None and (record.cluster, record.job, record.name) == wanted:
            return run, record
    return None


def _named(config: JobConfig) -> Run | None:
    """The newest run of the name, or NAME-2, NAME-3, ..., that has a checkpoint."""
    name = re.compile(re.escape(config.name) + r"(-\d+)?")
    return next((run for run in reversed(Run.all(config.runs)) if name.fullmatch(run.name) and _newest(run)), None)


def _newest(run: Run) -> int:
    """Step of the newest checkpoint; 0: there is none."""
    return max((info.step for info in checkpoint.checkpoints(run.checkpoints)), default=0)


def _read(run: Path) -> BatchRecord | None:
    try:
        return BatchRecord.model_validate_json((run / _RECORD).read_bytes())
    except (OSError, ValidationError):
        return None


def _write(run: Run, record: BatchRecord) -> None:
    new = run.directory / f"{_RECORD}.new"
    new.write_text(record.model_dump_json() + "\n")
    os.replace(new, run.directory / _RECORD)
