"""Which records an agent sends along, so that whoever joins them knows how long transfers take: a few of some steps.

All ranks choose the same collectives without asking each other: steps whose number a power of two divides, and of those the
first of every kind.
"""

from dataclasses import dataclass, field

import numpy as np

_STEPS = 2
"""That are sampled in a window, about; where more pass every second, fourth, ... is."""
_OF_A_KIND = 8
"""Records of one step with the same group, operation and other side."""
_MOST = 64
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
    """Of the newest step, by kind."""

    def choose(self, records: np.ndarray) -> np.ndarray:
        """Those of a window's complete records, in order, that are sent along; a copy."""
        if not len(records):
            return records.copy()
        steps = records["step"].astype(np.int64)
        passed = int(steps[-1]) - self._last_step if self._last_step >= 0 else 0
        self._pace += _NEWEST * (min(max(passed, 0), len(records)) - self._pace)
        stride = 1 << max(int(np.ceil(np.log2(max(self._pace, 1.0) / _STEPS))), 0)
        found = records[(steps % stride == 0) & self._is_first(records, steps)][:_MOST].copy()
        self._last_step = int(steps[-1])
        return found

    def _is_first(self, records: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Array [records]: it is one of the first of its kind in its step."""
        parts = [records[name].astype(np.int64) for name in ("group", "operation", "peer")]
        keys = (parts[0] << 40) + (parts[1] << 32) + (parts[2] & 0xFFFFFFFF)
        order = np.lexsort((keys, steps))
        is_other = np.ones(len(order), bool)
        is_other[1:] = (np.diff(keys[order]) != 0) | (np.diff(steps[order]) != 0)
        starts = np.flatnonzero(is_other)
        place = np.arange(len(order)) - np.repeat(starts, np.diff([*starts, len(order)]))
        before = self._counts if int(steps[0]) == self._last_step else {}
        carried = [before.get(int(keys[order[at]]), 0) if steps[order[at]] == steps[0] else 0 for at in starts]
        place += np.repeat(carried, np.diff([*starts, len(order)]))
        self._note(before if steps[0] == steps[-1] else {}, keys[order], steps[order] == steps[-1], place)
        found = np.zeros(len(order), bool)
        found[order] = place < _OF_A_KIND
        return found

    def _note(self, before: dict[int, int], keys: np.ndarray, is_last: np.ndarray, place: np.ndarray) -> None:
        """Remember how many of each kind the newest step has had."""
        newest = dict(zip(keys[is_last].tolist(), (place[is_last] + 1).tolist(), strict=True))
        self._counts = {**before, **newest}
