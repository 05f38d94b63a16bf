"""When rank 0 wants a snapshot: as configured, or as often as it pays, by what this attempt measures."""

import math
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from evermesh.fault.snapshot.frequency import Failures, Measured, choose, failure_every_s, is_another, rates_of, told
from evermesh.fault.snapshot.stripes.interval import Interval, interval
from evermesh.runtime.config import SnapshotConfig

_STEPS, _COPIES = 32, 8
"""How many of the last ones the medians are taken of."""
_LEAST_STEPS = 4
_AGAIN_S = 10.0
"""How long nothing is tried while none was ever complete, and so nothing is known."""


class SnapshotSchedule:
    """Rank 0 asks it in every step; on other ranks it does nothing that counts.

    Args:
        config: of the run.
        seen: failures of the run before this attempt.
        log: writes an event: kind, text, fields.
    """

    def __init__(self, config: SnapshotConfig, seen: Failures, log: Callable[..., None]) -> None:
        self._config, self._seen, self._log = config, seen, log
        self._began_s = self._asked_s = time.monotonic()
        self._restart_s: float | None = None
        self._steps_s: deque[float] = deque(maxlen=_STEPS)
        self._stops_s: deque[float] = deque(maxlen=_COPIES)
        self._commits_s: deque[float] = deque(maxlen=_COPIES)
        self._taken: tuple[int, float] | None = None
        """Step and time of the last copy; None: the next step is one to make a snapshot behind."""
        self.chosen: Interval | None = None

    @property
    def chooses(self) -> bool:
        """Whether the configuration leaves it open how often."""
        return self._config.every is None

    def is_due(self, step: int) -> bool:
        """Whether a snapshot is to be made behind ``step``. Called once in every step."""
        now_s = time.monotonic()
        if self._restart_s is None:
            self._restart_s = _age_s()
        else:
            self._steps_s.append(now_s - self._asked_s)
        self._asked_s = now_s
        if self.chosen is None:
            self._choose()
        if self._taken is None:
            return True
        if self._config.every is not None:
            return step % self._config.every == 0
        taken, taken_s = self._taken
        return now_s - taken_s >= _AGAIN_S if self.chosen is None else step - taken >= self.chosen.steps

    def note_taken(self, step: int, stop_s: float) -> None:
        """A copy of ``step`` was made, for which training stood still."""
        now_s = time.monotonic()
        self._taken = step, now_s - stop_s
        self._stops_s.append(stop_s)
        self._asked_s += stop_s  # it is no part of a step

    def note_committed(self) -> None:
        """All ranks have their part of the last one."""
        if self._taken is None:
            return
        self._commits_s.append(time.monotonic() - self._taken[1])
        self._choose()

    def hurry(self) -> None:
        """The next step is one to make a snapshot behind; what was measured is of another layout."""
        self._taken = self.chosen = None
        for measured in (self._steps_s, self._stops_s, self._commits_s):
            measured.clear()

    def _choose(self) -> None:
        if len(self._steps_s) < _LEAST_STEPS or not self._commits_s:
            return
        measured = Measured(
            median(self._steps_s), median(self._stops_s), median(self._commits_s), self._restart_s or 0.0
        )
        running_s = self._seen.running_s + time.monotonic() - self._began_s
        seen = self._seen._replace(running_s=running_s)
        every_s = failure_every_s(seen, self._config.node_mtbf_h * 3600)
        every = self._config.every
        found = (
            choose(measured, every_s, self._config.most_cost)
            if every is None
            else interval(rates_of(measured, every_s), every)
        )
        if not is_another(self.chosen, found):
            return
        self.chosen = found
        text = told(found, measured, seen, every_s, is_configured=every is not None)
        self._log("snapshot interval", text, **_fields(found, measured, every_s))


def _fields(chosen: Interval, measured: Measured, every_s: float) -> dict[str, Any]:
    finite = {name: value for name, value in measured._asdict().items() if math.isfinite(value)}
    return {"steps": chosen.steps, "lost_share": chosen.lost_share, "failure_every_s": every_s, **finite}


def _age_s() -> float:
    """How long this process lives: the time that a restart takes once more."""
    try:
        fields = Path(f"/proc/{os.getpid()}/stat").read_bytes().rpartition(b")")[2].split()
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):
        return 0.0
