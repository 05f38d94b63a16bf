"""At which moments the windows of different nodes were read, although their clocks differ and messages take time.

A window is heard later than it was read by the difference of two clocks, which stays the same, and by the time that it was on
its way, which does not. The fastest of the last windows of a node was on its way for hardly longer than the fastest of
another; what a window took more than that one it lost on its way.
"""

from collections import deque

_LAST = 64
"""Windows of a node that are remembered: clocks drift by milliseconds meanwhile."""
_SETTLED = 8
"""Windows after which one of them was a fast one."""
_DOUBT_S, _UNSETTLED_S = 0.05, 0.25
"""By how much the fastest windows of two nodes may differ, and any two windows."""


class ReadingTimes:
    """Of the newest windows of all nodes."""

    def __init__(self) -> None:
        self._lags_s: dict[str, deque[float]] = {}
        self._newest: dict[str, tuple[float, float, float]] = {}
        """First and last reading by the clock of the node, and when it was heard."""

    def note(self, node: str, first_s: float, last_s: float, heard_s: float) -> None:
        """A window was heard, by the clock of the controller, whose ranks were read then, by that of the node."""
        self._lags_s.setdefault(node, deque(maxlen=_LAST)).append(heard_s - last_s)
        self._newest[node] = (first_s, last_s, heard_s)

    def apart_s(self) -> float:
        """By how much the moments at which the newest windows of two nodes were read differ, at most."""
        if len(self._newest) < 2:
            return 0.0
        if min(map(len, self._lags_s.values())) < _SETTLED:
            heard_s = [heard_s for _, _, heard_s in self._newest.values()]
            return max(heard_s) - min(heard_s) + _UNSETTLED_S
        lag_s = {node: min(lags_s) for node, lags_s in self._lags_s.items()}
        first_s = min(first_s + lag_s[node] for node, (first_s, _, _) in self._newest.items())
        last_s = max(last_s + lag_s[node] for node, (_, last_s, _) in self._newest.items())
        return last_s - first_s + _DOUBT_S
