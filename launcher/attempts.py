"""The attempts of a run: each is one life of the worker group; what follows from a failed one is decided elsewhere."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from evermesh import checkpoint
from evermesh.fault.events import Abort, EventLog
from evermesh.launcher.config import JobConfig
from evermesh.launcher.errors import WorkersFailed
from evermesh.launcher.interrupts import Interrupts
from evermesh.launcher.progress import Progress
from evermesh.launcher.restarts import (
    DO_NOT_REQUEUE,
    NO_PROGRESS_LIMIT,
    FailedAttempt,
    attempts_without_progress,
    decide,
)
from evermesh.launcher.run_directory import Run, RunState, now
from evermesh.launcher.workers import WorkerGroup
from evermesh.parallelism.errors import EvermeshError
from evermesh.runtime.config import CpuDevice
from evermesh.runtime.telemetry import StepReport

_ENTRY = "evermesh.launcher.training:train"

Watch = Callable[[StepReport, Mapping[int, int]], None]
"""(report of a step, process of every worker by rank) -> None."""


@dataclass(frozen=True, slots=True)
class AttemptResult:
    """How the last attempt of a launch ended, which did not fail."""

    step: int
    """Steps finished by the run."""
    reason: Literal["finished", "stop_at", "asked"]
    checkpoint: Path | None
    """The newest checkpoint."""
    exit_code: int
    """0, or 128 + the signal that asked for the end."""


def run_attempts(
    run: Run, config: JobConfig, *, resume: bool, console: Console, watch: Watch | None = None
) -> AttemptResult:
    """Train ``run`` on workers of this machine until it ends, is stopped, or fails for good; keep its state on disk.

    After a worker died or raised, all are ended and started again from the newest checkpoint, as ``restarts.decide``
    says. ``config`` becomes the configuration of the run. Call it from the main thread: it handles Ctrl-C, SIGTERM and
    the loss of the terminal. ``watch`` is called with every step's report and the processes of the workers, by rank. No
    worker is left when it returns or raises.

    Raises:
        RunAlive: another launcher trains this run.
        WorkersFailed: a worker failed and there is no other attempt; says why. The run can be resumed.
        KeyboardInterrupt: stopped at once, at the second signal, whose number is its argument.
    """
    failed: list[FailedAttempt] = []
    with run.locked(), Interrupts() as interrupts:
        while True:
            state, began_at, written = _begin(run, config), _newest_step(run), _steps_written(run)
            try:
                result = _train(run, config, resume, interrupts, console, watch)
            except KeyboardInterrupt:
                _end(
                    run,
                    state,
                    "stopped",
                    "stopped at once by a second signal; steps after the last checkpoint are lost",
                )
                raise
            except WorkersFailed as error:
                _fail(run, state, error)
                failed.append(FailedAttempt(error.cause, _steps_written(run) - written, began_at, _newest_step(run)))
                if interrupts.received:
                    raise
                _restart_or_raise(run, error, failed, config.restarts, console)
                resume = failed[-1].checkpoint is not None
            except Exception as error:
                _fail(run, state, error)
                raise
            else:
                _end(run, state, "finished" if result.reason == "finished" else "stopped", None)
                return result


def _newest_step(run: Run) -> int | None:
    newest = checkpoint.latest(run.checkpoints)
    return next((found.step for found in checkpoint.checkpoints(run.checkpoints) if found.path == newest), None)


def _last_step(run: Run) -> int:
    """The step that was trained last."""
    lines = run.telemetry.read_bytes().splitlines() if run.telemetry.is_file() else []
    return StepReport.from_json(lines[-1]).step if lines else 0


def _steps_written(run: Run) -> int:
    """Steps in the telemetry, those that were trained twice counted twice."""
    return run.telemetry.read_bytes().count(b"\n") if run.telemetry.is_file() else 0


def _restart_or_raise(
    run: Run, error: WorkersFailed, failed: Sequence[FailedAttempt], max_restarts: int, console: Console
) -> None:
    decision = decide(failed, max_restarts)
    if isinstance(decision, Abort):
        if len(failed) > 1 or max_restarts:
            error.add_note(f"No other attempt: {decision.reason}.")
        if attempts_without_progress(failed) >= NO_PROGRESS_LIMIT:
            error.exit_code = DO_NOT_REQUEUE
        raise error
    step = failed[-1].checkpoint
    place = f"step {step}" if step is not None else "the beginning, there is no checkpoint yet"
    text = f"{str(error).splitlines()[0]} Going on from {place} ({decision.reason})."
    console.print(text, style="yellow", highlight=False, soft_wrap=True)
    with EventLog(run.events) as events:
        events.write("restarted", text, step=step or 0)


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
    _drop_unfinished_line(run.telemetry)
    text = str(error) if isinstance(error, EvermeshError) else f"{type(error).__name__}: {error}"
    try:
        _end(run, state, "failed", text)
        with EventLog(run.events) as events:
            events.write("failed", text, step=_last_step(run), attempt=state.attempt)
    except OSError as unwritten:
        error.add_note(f"This could not be written to {run.directory}: {unwritten}")


def _train(
    run: Run, config: JobConfig, resume: bool, interrupts: Interrupts, console: Console, watch: Watch | None
) -> AttemptResult:
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

        def on_report(values: dict[str, Any]) -> None:
            report = StepReport.from_json(json.dumps(values))
            progress.show(report)
            if watch is not None:
                watch(report, group.process_ids)

        outcome = group.wait(on_report, stopper.tick)
    newest = Path(outcome["checkpoint"]) if outcome["checkpoint"] else None
    return AttemptResult(outcome["step"], outcome["reason"], newest, interrupts.exit_code)


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
