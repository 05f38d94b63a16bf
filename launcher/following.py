"""Watching a job from outside until it ends: what a run's directory tells, and what signals ask for.

Whoever follows may come and go; the job does not depend on it.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from rich.console import Console

from evermesh import checkpoint
from evermesh.checkpoint.stores.places import Place
from evermesh.fault.events import Event
from evermesh.launcher.agent.revival import Revival
from evermesh.launcher.client import Client
from evermesh.launcher.errors import ControllerLost, StoppedAtOnce, WorkersFailed
from evermesh.launcher.interrupts import Interrupts
from evermesh.launcher.lines import Lines
from evermesh.launcher.progress import Progress
from evermesh.launcher.run_directory import Run, RunState
from evermesh.launcher.succession.office import election_s
from evermesh.runtime.telemetry import StepReport

_LOOK_S = 0.02
DEAD_AFTER_S = 6.0
"""How long a run may be without a controller; an agent, or who shows the job, starts a dead one again before that."""
_BEGIN_S = 60.0
"""How long one may take to begin of which nobody sees whether it still does."""
_TOLD = (
    "restarted",
    "regrouping",
    "stacks",
    "node cut off",
    "node back",
    "node lost",
    "node refused",
    "health",
    "keeper lost",
    "fresh interpreters",
    "snapshots degraded",
    "rack unprotected",
    "nodes ordered",
    "tensor parallelism",
    "settings",
    "snapshot rebuilt",
    "snapshot lost",
    "layout chosen",
    "flushed",
    "flush failed",
    "checkpoint failed",
    "finding",
)
"""Events that are shown among the steps."""
_LOG_LINES = 8

Watch = Callable[[StepReport, Mapping[int, int]], None]
"""(report of a step, process of every worker by rank) -> None."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """How a job ended that did not fail."""

    step: int
    """Steps finished by the run."""
    reason: Literal["finished", "stop_at", "asked", "left"]
    """``left``: it goes on, but nobody watches any more."""
    checkpoint: Place | None
    """The newest checkpoint."""
    exit_code: int
    """0, or 128 + the signal that asked for the end."""


class Follower:
    """Shows a run from the moment it is made; make it before the controller starts, so that nothing is missed."""

    def __init__(self, run: Run, console: Console, watch: Watch | None = None) -> None:
        self._run, self.console, self._watch = run, console, watch
        self._steps, self._events = Lines(run.telemetry), Lines(run.events)
        self._client = Client(run)
        self._stopped_by: signal.Signals | None = None
        self._is_queued = run.config().on == "slurm"
        """SIGUSR1 says that the nodes are taken away soon."""
        self._last_alive_s = time.monotonic()
        self._election_s = election_s(run.config())
        self._revival = Revival(run.directory, None, self._election_s)

    def follow(self, controller: subprocess.Popen[bytes] | None = None, *, until_controlled: bool = False) -> JobResult:
        """Show steps and events until the job ends; pass on what signals ask for. Call it from the main thread.

        ``controller`` was started by this process just now, and is reaped when it ends; None if it was started as nobody's
        child. With ``until_controlled`` it returns as soon as there is one.

        Raises:
            WorkersFailed: the job failed; says why.
            StoppedAtOnce: it was ended without a checkpoint.
            ControllerLost: nobody controls it any more.
        """
        with Interrupts() as interrupts, Progress(self.console) as progress:
            while True:
                state = self._state()
                self._show(progress)
                if state.state not in ("created", "running"):
                    break
                if self._answer(interrupts, progress):
                    return self._left(128 + signal.SIGHUP)
                if until_controlled and state.state == "running":
                    return self._left(0)
                self._check_alive(controller, has_begun=state.state == "running")
                time.sleep(_LOOK_S)
        if controller is not None:
            controller.wait()
        return _result(self._run, state)

    def _state(self) -> RunState:
        try:
            return self._run.state()
        except FileNotFoundError as error:
            raise ControllerLost(f"somebody has removed {self._run.directory}: its job ends without a save") from error

    def _show(self, progress: Progress) -> None:
        for line in self._steps.new():
            report = StepReport.from_json(line)
            progress.show(report)
            if self._watch is not None:
                ranks = self._client.status().ranks
                self._watch(report, {rank.rank: rank.pid for rank in ranks if rank.pid is not None})
        for line in self._events.new():
            with suppress(ValidationError):  # torn, by a full disk
                event = Event.model_validate_json(line)
                if event.kind in _TOLD:
                    progress.say(event.text)

    def _answer(self, interrupts: Interrupts, progress: Progress) -> bool:
        """Do what the next signal asks for; whether it is to leave."""
        number = interrupts.next()
        if number is None:
            return False
        if number is signal.SIGHUP:
            return True
        if number is signal.SIGUSR1 and not self._is_queued:
            progress.say("saving after this step")
            self._client.save()
        elif self._stopped_by is None or (self._stopped_by is signal.SIGUSR1 and number is signal.SIGTERM):
            self._stopped_by = number
            progress.say("stopping after this step; again to stop at once")
            grace_s = self._run.config().grace_s if number is signal.SIGTERM else None
            # Slurm warns first: the controller knows how much time is left
            self._client.stop(signal.SIGTERM if number is signal.SIGUSR1 else number, grace_s=grace_s)
        else:
            self._client.stop(number, at_once=True)
        return False

    def _left(self, exit_code: int) -> JobResult:
        text = f"the job goes on by itself; it is found again with: evermesh status {self._run.directory}"
        self.console.print(text, style="yellow", highlight=False, soft_wrap=True)
        return JobResult(0, "left", None, exit_code)

    def _check_alive(self, controller: subprocess.Popen[bytes] | None, *, has_begun: bool) -> None:
        is_starting = controller is not None and controller.poll() is None
        limit_s = DEAD_AFTER_S + self._election_s if has_begun or controller is not None else _BEGIN_S
        if is_starting or self._run.is_alive():
            self._last_alive_s = time.monotonic()
        elif time.monotonic() - self._last_alive_s > limit_s:
            log = self._run.logs / "controller.log"
            last = "".join(f"\n  | {line}" for line in _tail(log))
            raise ControllerLost(f"the controller of run {self._run.name} is gone. Its log, {log}, ends with:{last}")
        else:
            self._revival.consider(time.monotonic() - self._last_alive_s)


def _result(run: Run, state: RunState) -> JobResult:
    code = state.exit_code or 0
    if state.state == "failed":
        raise WorkersFailed(state.error or "no reason was written down", traceback=state.traceback, exit_code=code)
    if state.state == "stopped" and state.error:
        raise StoppedAtOnce(f"at once, without a save ({state.error})", code)
    newest = checkpoint.latest(run.checkpoints)
    steps = next((found.step for found in checkpoint.checkpoints(run.checkpoints) if found.path == newest), 0)
    reason: Literal["finished", "stop_at", "asked"] = "asked" if code else "stop_at"
    return JobResult(steps, "finished" if state.state == "finished" else reason, newest, code)


def _tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-_LOG_LINES:] if os.path.isfile(log) else []
