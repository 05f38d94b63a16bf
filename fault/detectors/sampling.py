"""Which records an agent sends along, so that whoever joins them knows how long transfers take: a few of some steps.

All ranks choose the same collectives without asking each other: steps whose number a power of two divides, and of those the
first of every kind. About one step of a window is sampled.
"""

from dataclasses import dataclass, field

import numpy as np

_OF_A_KIND = 8
"""Records of one step with the same group, operation and other side."""
MOST = 64
"""Records in one window."""
_NEWEST = 0.2
"""Weight of the newest window in the number of steps that pass in one."""


@dataclass(slots=True)
class Sampler:
    """Of one rank."""

    _pace: float = 1.0
    """Steps in a window."""
    _last_step: int = -1
    _counts: dict[int, int] = field(default_factory=dict)
    """Records of that step, by kind, where it is sampled."""

    def choose(self, records: np.ndarray) -> np.ndarray:
        """Those of a window's complete records, in order, that are sent along; a copy."""
        if not len(records):
            return records.copy()
        steps = records["step"].astype(np.int64)
        newest = int(steps[-1])
        passed = newest - self._last_step if self._last_step >= 0 else 0
        self._pace += _NEWEST * (min(max(passed, 0), len(records)) - self._pace)
        stride = 1 << int(np.ceil(np.log2(max(self._pace, 1.0))))
        sampled = steps % stride == 0
        if passed:
            before, self._counts = self._counts, {}
        else:
            before = self._counts
        is_first = self._is_first(records[sampled], steps[sampled], before, newest)
        self._last_step = newest
        return records[sampled][is_first][:MOST]

    def _is_first(self, records: np.ndarray, steps: np.ndarray, before: dict[int, int], newest: int) -> np.ndarray:
        """Array [records]: it is one of the first of its kind in its step. ``before``: how many of each kind there were
        in the last step of the last window. Those of the step ``newest`` are remembered."""
        parts = [records[name].astype(np.int64) for name in ("group", "operation", "peer")]
        keys = (parts[0] << 40) + (parts[1] << 32) + (parts[2] & 0xFFFFFFFF)
        order = np.lexsort((keys, steps))
        keys, steps = keys[order], steps[order]
        is_other = np.ones(len(order), bool)
        is_other[1:] = (keys[1:] != keys[:-1]) | (steps[1:] != steps[:-1])
        starts = np.flatnonzero(is_other)
        sizes = np.diff(starts, append=len(order))
        known = [before.get(int(keys[at]), 0) if steps[at] == self._last_step else 0 for at in starts]
        for at, size, more in zip(starts, sizes, known, strict=True):
            if steps[at] == newest:
                self._counts[int(keys[at])] = int(size) + more
        place = np.arange(len(order)) - np.repeat(starts - np.array(known, np.int64), sizes)
        found = np.zeros(len(order), bool)
        found[order] = place < _OF_A_KIND
        return found
