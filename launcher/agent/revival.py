"""A controller that died is started again by an agent on its machine, or by whoever shows the job there."""

import time
from collections import deque
from pathlib import Path

from evermesh.launcher.errors import RunNotFound
from evermesh.launcher.processes import start_controller_apart
from evermesh.launcher.run_directory import Run

_PATIENCE_S = 0.2
"""Seconds without a controller before the agent of the first node looks whether it lives."""
_START_S = 2.0
"""How much longer each later node waits: one new controller is enough."""
_WATCHER_S = 1.0
"""How long who shows the job waits: where the controller has a machine for itself, no agent will do it."""
_AGAIN_S = 5.0
"""How long one that was started has until it answers; then another is."""
_AT_ONCE = 10
_WITHIN_S = 60.0
"""So many within so many seconds are started as soon as they are missed; more of them wait as one that does not answer."""


class Revival:
    """Decides when to start the controller of ``run`` again, and does it. Its lock lets only one of several live."""

    def __init__(self, run: Path, node: str | None, later_s: float = 0.0) -> None:
        """``node`` is None for who shows the job; ``later_s`` leaves others time to be elected."""
        self._run = Run(run)
        self.patience_s = later_s + (_WATCHER_S if node is None else _PATIENCE_S + _START_S * _number(node))
        self._tries_s: deque[float] = deque(maxlen=_AT_ONCE)

    def consider(self, missing_s: float, *, is_head: bool = False) -> bool:
        """Start it if it has been missing for ``missing_s`` long enough, is dead, and should live; whether that was done.

        The agent of the node that the controller counts to (``is_head``) leaves nobody time for that.
        """
        patience_s = _PATIENCE_S if is_head else self.patience_s
        if missing_s < patience_s or self._waits(missing_s) or not self._is_wanted():
            return False
        self._tries_s.append(time.monotonic())
        print(f"starting the controller again after {missing_s:.2f} s without it", flush=True)
        start_controller_apart(self._run)
        return True

    def _waits(self, missing_s: float) -> bool:
        """Whether the last one that was started may come yet, or too many have come and died."""
        now_s, tries_s = time.monotonic(), self._tries_s
        if not tries_s or now_s - tries_s[-1] >= _AGAIN_S:
            return False
        has_come = now_s - missing_s > tries_s[-1]
        return not has_come or (len(tries_s) == _AT_ONCE and now_s - tries_s[0] < _WITHIN_S)

    def _is_wanted(self) -> bool:
        try:
            return self._run.state().state == "running" and not self._run.is_alive()
        except (RunNotFound, OSError):
            return False  # the directory is gone


def _number(node: str) -> int:
    digits = "".join(filter(str.isdigit, node))
    return int(digits) if digits else 0
