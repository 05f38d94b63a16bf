"""One attempt: one life of the worker group, from the lock of the run to its closing state."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from evermesh.fault.events import EventLog
from evermesh.launcher.config import JobConfig
from evermesh.launcher.interrupts import Interrupts
from evermesh.launcher.progress import Progress
from evermesh.launcher.run_directory import Run, RunState, now
from evermesh.launcher.workers import WorkerGroup
from evermesh.parallelism.errors import EvermeshError
from evermesh.runtime.config import CpuDevice
from evermesh.runtime.telemetry import StepReport

_ENTRY = "evermesh.launcher.training:train"


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """How an attempt ended that did not fail."""

    step: int
    """Steps finished by the run."""
    reason: Literal["finished", "stop_at", "asked"]
    checkpoint: Path | None
    """The newest checkpoint."""
    exit_code: int
    """0, or 128 + the signal that asked for the end."""


def run_attempt(run: Run, config: JobConfig, *, resume: bool, console: Console) -> AttemptResult:
    """Train ``run`` on workers of this machine until it ends, is stopped, or fails; keep its state on disk.

    ``config`` becomes the configuration of the run. Call it from the main thread: it handles Ctrl-C, SIGTERM and
    the loss of the terminal. No worker is left when it returns or raises.

    Raises:
        RunAlive: another launcher trains this run.
        WorkersFailed: a worker failed; the run can be resumed from its newest checkpoint.
        KeyboardInterrupt: stopped at once, at the second signal, whose number is its argument.
    """
    with run.locked(), Interrupts() as interrupts:
        state = _begin(run, config)
        try:
            result = _train(run, config, resume, interrupts, console)
        except KeyboardInterrupt:
            _end(run, state, "stopped", "stopped at once by a second signal; steps after the last checkpoint are lost")
            raise
        except Exception as error:
            _fail(run, state, error)
            raise
        _end(run, state, "finished" if result.reason == "finished" else "stopped", None)
        return result


def _begin(run: Run, config: JobConfig) -> RunState:
    attempt = run.state().attempt + 1
    run.write_config(config)
    _drop_unfinished_line(run.telemetry)
    state = RunState(state="running", pid=os.getpid(), workers=config.workers, attempt=attempt, started=now())
    run.write_state(state)
    return state


def _drop_unfinished_line(path: Path) -> None:
    """Cut off what a killed writer left, so that the next line does not continue it."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _end(run: Run, state: RunState, ended: Literal["finished", "stopped", "failed"], error: str | None) -> None:
    run.write_state(state.model_copy(update={"state": ended, "ended": now(), "error": error}))


def _fail(run: Run, state: RunState, error: Exception) -> None:
    """Write down why the attempt failed; a full disk must not hide that from the caller."""
    text = str(error) if isinstance(error, EvermeshError) else f"{type(error).__name__}: {error}"
    try:
        _end(run, state, "failed", text)
        with EventLog(run.events) as events:
            events.write("failed", text, attempt=state.attempt)
    except OSError as unwritten:
        error.add_note(f"This could not be written to {run.directory}: {unwritten}")


def _train(run: Run, config: JobConfig, resume: bool, interrupts: Interrupts, console: Console) -> AttemptResult:
    arguments = {
        "config": config.train.model_dump(mode="json"),
        "directory": str(run.directory.absolute()),
        "resume": resume,
    }
    device = config.train.device
    threads = device.threads if isinstance(device, CpuDevice) else 1
    group = WorkerGroup(_ENTRY, arguments, workers=config.workers, logs=run.logs, threads=threads)
    with Progress(console) as progress, group:
        stopper = _Stopper(group, interrupts, progress)
        outcome = group.wait(lambda values: progress.show(StepReport.from_json(json.dumps(values))), stopper.tick)
    checkpoint = Path(outcome["checkpoint"]) if outcome["checkpoint"] else None
    return AttemptResult(outcome["step"], outcome["reason"], checkpoint, interrupts.exit_code)


class _Stopper:
    """Passes the first signal on to the workers, once."""

    def __init__(self, group: WorkerGroup, interrupts: Interrupts, progress: Progress) -> None:
        self._group, self._interrupts, self._progress = group, interrupts, progress
        self._asked = False

    def tick(self) -> None:
        """Ask the workers to stop if a signal has come."""
        if self._interrupts.received and not self._asked:
            self._asked = True
            self._progress.say("stopping after this step; again to stop at once")
            self._group.ask_stop()
