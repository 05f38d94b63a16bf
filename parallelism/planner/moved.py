"""What a new plan of the same batch moves: tokens that a rank needs and did not hold."""

from typing import NamedTuple

import numpy as np

from evermesh.parallelism.planner.mending import Flags
from evermesh.parallelism.planner.rings import Integers
from evermesh.parallelism.rank_work import PackedRanks


class Moved(NamedTuple):
    """Of a batch."""

    sequences: int
    """Of which some rank needs tokens that it did not hold."""
    tokens: int
    """That ranks need and did not hold."""


class _Shares(NamedTuple):
    """The head and the tail chunk of some members of rings, as ``pieces.share_of`` cuts them."""

    starts: Integers
    """[2, M]"""
    stops: Integers
    """[2, M]"""

    @classmethod
    def of(cls, length: Integers, size: Integers, place: Integers) -> "_Shares":
        """Of members at ``place`` in rings of ``size``, all [M]."""
        chunks = np.stack((place, 2 * size - 1 - place))
        return cls(_chunk_start(length, size, chunks), _chunk_start(length, size, chunks + 1))

    @property
    def tokens(self) -> Integers:
        """Of every member, [M]."""
        tokens: Integers = (self.stops - self.starts).sum(axis=0)
        return tokens

    def of_members(self, which: Flags) -> "_Shares":
        """Of some of them."""
        return _Shares(self.starts[:, which], self.stops[:, which])

    def common(self, other: "_Shares") -> Integers:
        """Tokens that are in both, [M]."""
        start = np.maximum(self.starts[:, None], other.starts[None])
        stop = np.minimum(self.stops[:, None], other.stops[None])
        tokens: Integers = np.maximum(stop - start, 0).sum(axis=(0, 1))
        return tokens


def moved_between(before: PackedRanks, after: PackedRanks, old_rank: Integers) -> Moved:
    """What ``after`` moves; ``old_rank`` has the number in ``before`` of every rank of ``after``."""
    rank_now = old_rank[after.ring]
    sequence, member = _members(after, _changed(before, after, rank_now))
    old_sequence, old_member = _members(before, np.unique(sequence))
    length, size, old_size = before.lengths[sequence], np.diff(after.ring_start), np.diff(before.ring_start)
    wanted = _Shares.of(length, size[sequence], member - after.ring_start[sequence])
    missing = wanted.tokens
    at = _same_in((old_sequence, before.ring[old_member]), (sequence, rank_now[member]))
    was = at >= 0
    old_place = old_member[at[was]] - before.ring_start[sequence[was]]
    missing[was] -= wanted.of_members(was).common(_Shares.of(length[was], old_size[sequence[was]], old_place))
    return Moved(len(np.unique(sequence[missing > 0])), int(missing.sum()))


def _changed(before: PackedRanks, after: PackedRanks, rank_now: Integers) -> Integers:
    """The sequences whose rings differ."""
    if not np.array_equal(before.ring_start, after.ring_start):
        return np.arange(len(before.lengths))
    return np.unique(_sequence_of(after)[rank_now != before.ring])


def _members(ranks: PackedRanks, sequences: Integers) -> tuple[Integers, Integers]:
    """Of all ring members of some sequences: the sequence, and where the member is in ``ranks.ring``."""
    of = _sequence_of(ranks)
    is_wanted = np.zeros(len(ranks.lengths), np.bool_)
    is_wanted[sequences] = True
    found = np.flatnonzero(is_wanted[of])
    return of[found], found


def _sequence_of(ranks: PackedRanks) -> Integers:
    return np.repeat(np.arange(len(ranks.lengths)), np.diff(ranks.ring_start))


def _same_in(there: tuple[Integers, Integers], wanted: tuple[Integers, Integers]) -> Integers:
    """Where each wanted pair of sequence and rank is among those there, which are all different; -1: nowhere."""
    if not len(there[0]):
        return np.full(len(wanted[0]), -1)
    ranks = 1 + max(there[1].max(initial=0), wanted[1].max(initial=0))
    keys, of = there[0] * ranks + there[1], wanted[0] * ranks + wanted[1]
    order = np.argsort(keys)
    at = order[np.minimum(np.searchsorted(keys, of, sorter=order), len(keys) - 1)]
    return np.where(keys[at] == of, at, -1)


def _chunk_start(length: Integers, size: Integers, chunk: Integers) -> Integers:
    """Where a chunk begins, as in ``pieces``."""
    each, rest = np.divmod(length, 2 * size)
    longer_tails = np.minimum(rest, size)
    return chunk * each + np.minimum(chunk, rest - longer_tails) + np.clip(chunk - size, 0, longer_tails)
