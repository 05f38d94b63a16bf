"""A controller that died is started again by an agent on its machine, or by whoever shows the job there."""

import time
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


class Revival:
    """Decides when to start the controller of ``run`` again, and does it. Its lock lets only one of several live."""

    def __init__(self, run: Path, node: str | None, later_s: float = 0.0) -> None:
        """``node`` is None for who shows the job; ``later_s`` leaves others time to be elected."""
        self._run = Run(run)
        self.patience_s = later_s + (_WATCHER_S if node is None else _PATIENCE_S + _START_S * _number(node))
        self._tried_s = float("-inf")

    def consider(self, missing_s: float, *, is_head: bool = False) -> bool:
        """Start it if it has been missing for ``missing_s`` long enough, is dead, and should live; whether that was done.

        The agent of the node that the controller counts to (``is_head``) leaves nobody time for that.
        """
        patience_s = _PATIENCE_S if is_head else self.patience_s
        if missing_s < patience_s or time.monotonic() - self._tried_s < _AGAIN_S:
            return False
        if not self._is_wanted():
            return False
        self._tried_s = time.monotonic()
        print(f"starting the controller again after {missing_s:.2f} s without it", flush=True)
        start_controller_apart(self._run)
        return True

    def _is_wanted(self) -> bool:
        try:
            return self._run.state().state == "running" and not self._run.is_alive()
        except (RunNotFound, OSError):
            return False  # the directory is gone


def _number(node: str) -> int:
    digits = "".join(filter(str.isdigit, node))
    return int(digits) if digits else 0
