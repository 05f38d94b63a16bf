"""Whose rings are read whole, and when: only on suspicion, and ever more rarely where that explains nothing."""

from collections.abc import Callable, Sequence

from evermesh.fault.recorder.trace import RankTrace
from evermesh.launcher.watching.messages import ReadRings

_WAIT_S = 3.0
"""For the rings of all ranks; then those that have come are read."""
_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0
_MOST_RECORDS, _LEAST_RECORDS, _RECORDS_IN_ALL = 4096, 64, 1 << 20


class RingReading:
    """Of one generation. ``ask`` sends an order to all agents."""

    def __init__(self, generation: int, ask: Callable[[ReadRings], None]) -> None:
        self._generation, self._ask = generation, ask
        self._wanted: frozenset[int] = frozenset()
        self._asked_s: float | None = None
        self._came: dict[int, RankTrace] = {}
        self._of: frozenset[int] = frozenset()
        self._next_s, self._pause_s = 0.0, _PAUSE_S

    def suspect(self, ranks: Sequence[int], now_s: float) -> None:
        """Ask for the rings of these ranks, if it is time to."""
        suspicious = frozenset(ranks)
        if not suspicious or self._asked_s is not None:
            return
        if suspicious != self._of:
            self._of, self._pause_s, self._next_s = suspicious, _PAUSE_S, min(self._next_s, now_s)
        if now_s < self._next_s:
            return
        records = max(_LEAST_RECORDS, min(_MOST_RECORDS, _RECORDS_IN_ALL // len(suspicious)))
        self._wanted, self._asked_s, self._came = suspicious, now_s, {}
        self._ask(ReadRings(generation=self._generation, ranks=tuple(sorted(suspicious)), records=records))

    def take(self, trace: RankTrace) -> None:
        """One of those that were asked for."""
        if self._asked_s is not None and trace.rank in self._wanted:
            self._came[trace.rank] = trace

    def complete(self, now_s: float) -> list[RankTrace] | None:
        """All that came, once; None: they are awaited, or nobody has asked."""
        if self._asked_s is None:
            return None
        if len(self._came) < len(self._wanted) and now_s - self._asked_s < _WAIT_S:
            return None
        found, self._came, self._asked_s = list(self._came.values()), {}, None
        self._next_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return found
