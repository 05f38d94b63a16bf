"""What a new plan of the same batch moves: tokens that a rank needs and did not hold."""

from typing import NamedTuple

import numpy as np

from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.planner.rings import Integers
from evermesh.parallelism.rank_work import PackedRanks

Ranges = tuple[tuple[int, int], ...]


class Moved(NamedTuple):
    """Of a batch."""

    sequences: int
    """Of which some rank needs tokens that it did not hold."""
    tokens: int
    """That ranks need and did not hold."""


def moved_between(before: PackedRanks, after: PackedRanks, old_rank: Integers) -> Moved:
    """What ``after`` moves; ``old_rank`` has the number in ``before`` of every rank of ``after``."""
    now = old_rank[after.ring]
    sequences, tokens = 0, 0
    for sequence in _changed(before, after, now).tolist():
        length = int(before.lengths[sequence])
        old = before.ring[before.ring_start[sequence] : before.ring_start[sequence + 1]].tolist()
        new = now[after.ring_start[sequence] : after.ring_start[sequence + 1]].tolist()
        held = {rank: place for place, rank in enumerate(old)}
        missing = 0
        for place, rank in enumerate(new):
            if len(old) == len(new) and held.get(rank) == place:
                continue
            wanted = share_of(length, len(new), place).ranges()
            there = share_of(length, len(old), held[rank]).ranges() if rank in held else ()
            missing += sum(stop - start for start, stop in wanted) - _common(wanted, there)
        sequences += missing > 0
        tokens += missing
    return Moved(sequences, tokens)


def _changed(before: PackedRanks, after: PackedRanks, now: Integers) -> Integers:
    """The sequences whose rings differ."""
    if not np.array_equal(before.ring_start, after.ring_start):
        return np.arange(len(before.lengths))
    sequence_of = np.repeat(np.arange(len(before.lengths)), np.diff(after.ring_start))
    return np.unique(sequence_of[now != before.ring])


def _common(wanted: Ranges, held: Ranges) -> int:
    """Tokens that are in both."""
    return sum(
        max(0, min(stop, other_stop) - max(start, other_start))
        for start, stop in wanted
        for other_start, other_stop in held
    )
