"""A plan as columns of numbers, whatever form it has: what order, partners and certificate are proved on.

Legend: R ranks, M micro-batches, P pieces, N sequences.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain

import numpy as np
from numpy.typing import NDArray

from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.rank_work import Integers, PackedRanks

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Columns:
    """Of a plan in which the members of every ring agree about it. Micro-batches and pieces stand in the order of ranks."""

    lengths: Integers
    """[N]."""
    rank_start: Integers
    """Where the micro-batches of every rank begin, [R + 1]."""
    micro_batch_start: Integers
    """Where the pieces of every micro-batch begin, [M + 1]."""
    sequence: Integers
    """Of every piece, [P]."""
    ring_start: Integers
    """Where the members of every ring begin, [N + 1]."""
    ring: Integers
    """[P], in ring order."""
    heads: Integers
    """[N]."""
    gathers: Flags
    """[N]."""
    recomputed: Flags
    """[M]."""
    offload: NDArray[np.float64]
    """Of what is recomputed, [M]."""

    @cached_property
    def ring_size(self) -> Integers:
        """[N]."""
        return np.diff(self.ring_start)

    @cached_property
    def sequence_of_member(self) -> Integers:
        """[P], for ``ring``."""
        return np.repeat(np.arange(len(self.lengths)), self.ring_size)

    @cached_property
    def place_in_ring(self) -> Integers:
        """[P], for ``ring``: 0 for the first member."""
        return np.arange(len(self.ring)) - np.repeat(self.ring_start[:-1], self.ring_size)

    @cached_property
    def rank(self) -> Integers:
        """Of every micro-batch, [M]."""
        return np.repeat(np.arange(len(self.rank_start) - 1), np.diff(self.rank_start))

    @cached_property
    def index(self) -> Integers:
        """Of every micro-batch among those of its rank, [M]."""
        return np.arange(len(self.rank)) - self.rank_start[self.rank]

    @cached_property
    def micro_batch(self) -> Integers:
        """Of every piece, [P]."""
        return np.repeat(np.arange(len(self.rank)), np.diff(self.micro_batch_start))

    @cached_property
    def in_ring(self) -> Flags:
        """Whether a piece is shared, [P]."""
        return self.ring_size[self.sequence] > 1

    def tokens(self, of_pieces: Integers) -> Integers:
        """Of every micro-batch, [M], from those of its pieces, [P]."""
        total = np.concatenate([np.zeros(1, np.int64), np.cumsum(of_pieces)])
        return total[self.micro_batch_start[1:]] - total[self.micro_batch_start[:-1]]


def columns_of(plan: BatchPlan) -> Columns:
    """Without any check: the members of every ring agree, and every index points at something."""
    ranks = plan.ranks
    if isinstance(ranks, PackedRanks):
        return Columns(
            ranks.lengths,
            ranks.rank_start,
            ranks.micro_batch_start,
            ranks.sequence,
            ranks.ring_start,
            ranks.ring,
            ranks.heads,
            ranks.gathers,
            ranks.recomputed,
            ranks.offload,
        )
    micro_batches = list(chain.from_iterable(ranks))
    pieces = [piece for micro_batch in micro_batches for piece in micro_batch.pieces]
    by_sequence = {piece.sequence: piece for piece in pieces}
    one_of_each = [by_sequence[sequence] for sequence in range(len(plan.lengths))]
    return Columns(
        _array(plan.lengths),
        _array(accumulate((len(of_rank) for of_rank in ranks), initial=0)),
        _array(accumulate((len(micro_batch.pieces) for micro_batch in micro_batches), initial=0)),
        _array(piece.sequence for piece in pieces),
        _array(accumulate((len(piece.ring) for piece in one_of_each), initial=0)),
        _array(chain.from_iterable(piece.ring for piece in one_of_each)),
        _array(piece.heads for piece in one_of_each),
        np.array([piece.gathers for piece in one_of_each], np.bool_),
        np.array([micro_batch.recompute == "block" for micro_batch in micro_batches], np.bool_),
        np.array([micro_batch.offload for micro_batch in micro_batches], np.float64),
    )


def _array(numbers: Iterable[int]) -> Integers:
    return np.fromiter(numbers, np.int64)
