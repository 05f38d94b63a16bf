"""Reading what a run writes, and passing it on to one tracker, from where an earlier process was."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from evermesh.fault.events import Event, EventLog
from evermesh.launcher.lines import Lines
from evermesh.launcher.run_directory import Run
from evermesh.launcher.tracking.config import AnyTracker
from evermesh.launcher.tracking.tracker import Tracked, Tracker, open_tracker
from evermesh.launcher.tracking.values import settings_of, values_of
from evermesh.runtime.telemetry import StepReport

FOLDER = "trackers"
"""In the run's directory: how far each tracker is."""
_LOOK_S = 0.5
_FIRST_WAIT_S, _LONGEST_WAIT_S = 2.0, 300.0
_LAST_TRIES = 3
"""So often is a tracker that fails tried after the end of its run."""
_UNCONTROLLED_S = 120.0
"""After so many seconds a run that no controller holds is taken to have ended."""


class Position(BaseModel):
    """How far a tracker is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = 0
    """Bytes of ``telemetry.jsonl`` that it has been told of."""
    events: int = 0
    """Of ``events.jsonl``."""
    last_step: int = 0
    key: str | None = None
    """What it calls the run."""


class Following:
    """One tracker of one run.

    Args:
        tell: what is worth a line for people.
    """

    def __init__(self, run: Run, config: AnyTracker, tell: Callable[[str], None] = print) -> None:
        self._run, self._config, self._tell = run, config, tell
        self._path = run.directory / FOLDER / f"{config.kind}.json"
        self._tracker: Tracker | None = None
        self._seen_s = time.monotonic()
        """When a controller held the run last."""
        self._last_step = 0
        self._key: str | None = None
        self._take_position()

    def follow(self, ends: Callable[[], bool]) -> bool:
        """Pass on what comes until the run has ended, or ``ends`` says so; whether the tracker has been told all."""
        wait_s, failures = _FIRST_WAIT_S, 0
        while True:
            is_last = self._has_ended() or ends()
            try:
                self.pass_on()
                if is_last:
                    self.close()
                    return True
                wait_s, failures = _FIRST_WAIT_S, 0
                time.sleep(_LOOK_S)
            except Exception as error:  # noqa: BLE001  the boundary: packages and servers of others
                failures += 1
                self._note_failure(error, wait_s, is_first=failures == 1)
                if is_last and (failures >= _LAST_TRIES or ends()):
                    return False
                self._pause(min(wait_s, _FIRST_WAIT_S) if is_last else wait_s, ends)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def pass_on(self) -> int:
        """Tell the tracker all that is new; returns how many steps and events that is."""
        told = 0
        for line in self._events.new():
            event = _event_of(line)
            if event is not None:
                told += 1
                self._opened().event(event.step if event.step is not None else self._last_step, event)
        for line in self._steps.new():
            report = StepReport.from_json(line)
            told += 1
            self._opened().step(report.step, report.ended_s or time.time(), values_of(report))
            self._last_step = report.step
        if told:
            self._opened().flush()
            self._write_position()
        return told

    def close(self) -> None:
        """Nothing more comes from here."""
        if self._tracker is not None:
            tracker, self._tracker = self._tracker, None
            tracker.close(self._run.state().state)

    def _opened(self) -> Tracker:
        if self._tracker is None:
            told = Tracked(self._run.name, self._run.directory.absolute(), settings_of(self._run.config()))
            self._tracker = open_tracker(self._config, told, self._key)
            self._key = self._tracker.key
        return self._tracker

    def _has_ended(self) -> bool:
        state = self._run.state().state
        if state in ("created", "running") and self._run.is_alive():
            self._seen_s = time.monotonic()
        return state not in ("created", "running") or time.monotonic() - self._seen_s > _UNCONTROLLED_S

    def _note_failure(self, error: Exception, wait_s: float, *, is_first: bool) -> None:
        text = f"the tracker {self._config.kind} failed: {type(error).__name__}: {error}".splitlines()[0]
        self._tell(f"{text}; tried again in {wait_s:.0f} s")
        self._tracker = None
        self._take_position()
        if is_first:
            with EventLog(self._run.events) as log:
                log.write("tracker failed", f"{text}. Training goes on, and what it missed is told later.")

    def _pause(self, seconds: float, ends: Callable[[], bool]) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s and not ends():
            time.sleep(min(_LOOK_S, seconds))

    def _take_position(self) -> None:
        """Go on behind what the tracker has been told for sure."""
        position = _read(self._path)
        self._steps = Lines(self._run.telemetry, offset=position.steps)
        self._events = Lines(self._run.events, offset=position.events)
        self._last_step, self._key = position.last_step, position.key

    def _write_position(self) -> None:
        position = Position(
            steps=self._steps.offset, events=self._events.offset, last_step=self._last_step, key=self._key
        )
        self._path.parent.mkdir(exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text(position.model_dump_json())
        os.replace(new, self._path)


def _read(path: Path) -> Position:
    try:
        return Position.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return Position()


def _event_of(line: bytes) -> Event | None:
    try:
        return Event.model_validate_json(line)
    except ValidationError:
        return None  # of another version
