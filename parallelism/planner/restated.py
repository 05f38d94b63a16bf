"""How other systems assign a batch, restated from their papers: what a plan of ours is compared with.

None of this is those systems' code; each function says what it leaves out. All answer with the micro-batches of every HDP
rank, as our planners do, so that one verifier proves them and one simulator times them. None of them looks at the speeds
of ranks, and only the number of ranks is taken from the pool, but for one thing: in a static mesh every sequence gets the
cheapest scheme of attention that the layout allows, so that what differs from our plans is who gets what.
"""

import bisect
import functools
import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from evermesh.parallelism.batch_plan import MicroBatch, Piece
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.errors import SequenceTooLong
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.planner.bound import smallest_ring
from evermesh.parallelism.planner.costs import Coefficients, best_sharing
from evermesh.parallelism.planner.fractions import with_fractions
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.rank_work import Assignment

Baseline = Callable[[Sequence[int], Layout, CostModel, Pool], Assignment]
Pack = list[int]
"""Sequences that share a micro-batch."""
_BUCKETS = 16
"""Of about equal work, from long sequences to short ones; ByteScale does not say how many it has."""


def static(lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool) -> Assignment:
    """A fixed mesh of data and context parallelism; sequences are packed and dealt in the order in which they arrive.

    Context parallelism is as small as the longest sequence and the number of ranks allow, better than the usual choice for
    the longest sequence that a batch may ever have.

    Raises:
        SequenceTooLong: all ranks together cannot hold a sequence.
    """
    ring = _static_ring(lengths, layout.capacity, len(pool))
    packs: list[Pack] = [[]]
    filled = 0
    for sequence, length in enumerate(lengths):
        if filled + _share(length, ring) > layout.capacity:
            packs.append([])
            filled = 0
        packs[-1].append(sequence)
        filled += _share(length, ring)
    groups = len(pool) // ring
    by_group = [packs[group::groups] if lengths else [] for group in range(groups)]
    return _on_mesh(by_group, ring, lengths, layout, cost, pool)


def packed(lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool) -> Assignment:
    """The same mesh, but the work of a batch is balanced: longest first to the group with least, then packed best-fit.

    Where every sequence fits one rank, this is data parallelism with packing.

    Raises:
        SequenceTooLong: all ranks together cannot hold a sequence.
    """
    ring = _static_ring(lengths, layout.capacity, len(pool))
    by_group: list[list[int]] = [[] for _ in range(len(pool) // ring)]
    heap = [(0.0, group) for group in range(len(by_group))]
    for sequence in _descending(lengths):
        seconds, group = heap[0]
        by_group[group].append(sequence)
        heapq.heapreplace(heap, (seconds + cost.whole_s(lengths[sequence]), group))
    packs = [_best_fit(sequences, lengths, ring, layout.capacity) for sequences in by_group]
    return _on_mesh(packs, ring, lengths, layout, cost, pool)


def wlb(lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool) -> Assignment:
    """WLB-LLM (OSDI'25), algorithm 1, on the same mesh: micro-batches of equal work and unequal numbers of tokens.

    From long to short, a document joins the micro-batch with least work, if it does not fit there the one with fewest
    tokens. All groups run equally many micro-batches, the fewest with which everything fits. Left out: documents that
    wait for a later step, since the batch of a step is given.

    Raises:
        SequenceTooLong: all ranks together cannot hold a sequence.
    """
    ring = _static_ring(lengths, layout.capacity, len(pool))
    groups = len(pool) // ring
    shares = sum(_share(length, ring) for length in lengths)
    rounds = -(-shares // (groups * layout.capacity))
    while (packs := _least_work(lengths, ring, groups * rounds, layout.capacity, cost)) is None:
        rounds += 1
    by_group = [[pack for pack in packs[group::groups] if pack] for group in range(groups)]
    return _on_mesh(by_group, ring, lengths, layout, cost, pool)


def bytescale_1(lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool) -> Assignment:
    """ByteScale (arXiv 2502.21231), algorithm 1: as few ranks as a sequence needs, the next ones in turn.

    Sequences shorter than the capacity are packed best-fit. Left out: offloading, which would make rings smaller.

    Raises:
        SequenceTooLong: all ranks together cannot hold a sequence.
    """
    ranks: list[list[MicroBatch]] = [[] for _ in range(len(pool))]
    next_rank = 0
    for unit in _units(_descending(lengths), lengths, layout.capacity, len(pool)):
        members = sorted((next_rank + index) % len(pool) for index in range(unit.ring))
        next_rank = (next_rank + unit.ring) % len(pool)
        _append(unit, members, lengths, layout, ranks)
    return with_fractions(tuple(map(tuple, ranks)), lengths, layout, cost)


def bytescale_2(lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool) -> Assignment:
    """ByteScale (arXiv 2502.21231), algorithm 2, the form without pipelines: buckets of equal work, long ones first.

    The ranks with the shortest times are served first, from one bucket until it is empty, so that at any time all ranks
    have sequences of one level of lengths. The paper's threshold, under which a rank counts as balanced, is not
    given and is 0 here; its times have no term for communication. Left out: offloading, as in algorithm 1.

    Raises:
        SequenceTooLong: all ranks together cannot hold a sequence.
    """
    ranks: list[list[MicroBatch]] = [[] for _ in range(len(pool))]
    heap = [(0.0, rank) for rank in range(len(pool))]
    for bucket in _buckets(lengths, cost):
        for unit in _units(bucket, lengths, layout.capacity, len(pool)):
            served = [heapq.heappop(heap) for _ in range(unit.ring)]
            members = sorted(rank for _, rank in served)
            work_s = sum(cost.whole_s(lengths[sequence]) for sequence in unit.sequences) / unit.ring
            free_at = served[-1][0] + work_s + cost.micro_batch_s
            for rank in members:
                heapq.heappush(heap, (free_at, rank))
            _append(unit, members, lengths, layout, ranks)
    return with_fractions(tuple(map(tuple, ranks)), lengths, layout, cost)


RESTATED: Mapping[str, Baseline] = MappingProxyType(
    {"bytescale-1": bytescale_1, "bytescale-2": bytescale_2, "packed": packed, "static": static, "wlb": wlb}
)
"""By the name that users give."""


def _share(length: int, ring: int) -> int:
    """Tokens that no member of a ring exceeds."""
    return -(-length // ring)


class _Unit(NamedTuple):
    """What becomes one micro-batch of so many ranks."""

    sequences: Sequence[int]
    ring: int


def _descending(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda sequence: -lengths[sequence])


def _static_ring(lengths: Sequence[int], capacity: int, ranks: int) -> int:
    """The smallest ring that divides the ranks and holds every sequence."""
    for sequence, length in enumerate(lengths):
        if smallest_ring(length, capacity) > ranks:
            raise SequenceTooLong(sequence, length, capacity, ranks)
    needed = max((smallest_ring(length, capacity) for length in lengths), default=1)
    return next(ring for ring in range(needed, ranks + 1) if ranks % ring == 0)


def _best_fit(sequences: Sequence[int], lengths: Sequence[int], ring: int, capacity: int) -> list[Pack]:
    """Each sequence into the fullest micro-batch that still holds it."""
    packs: list[Pack] = []
    rooms: list[tuple[int, int]] = []
    for sequence in sequences:
        share = _share(lengths[sequence], ring)
        at = bisect.bisect_left(rooms, (share, 0))
        if at < len(rooms):
            room, index = rooms.pop(at)
        else:
            room, index = capacity, len(packs)
            packs.append([])
        packs[index].append(sequence)
        bisect.insort(rooms, (room - share, index))
    return packs


def _least_work(lengths: Sequence[int], ring: int, number: int, capacity: int, cost: CostModel) -> list[Pack] | None:
    """So many micro-batches with about equal work; None where something fits into none of them."""
    packs: list[Pack] = [[] for _ in range(number)]
    work_s, tokens = np.zeros(number), np.zeros(number, dtype=np.int64)
    for sequence in _descending(lengths):
        share = _share(lengths[sequence], ring)
        index = int(work_s.argmin())
        if tokens[index] + share > capacity:
            index = int(tokens.argmin())
        if tokens[index] + share > capacity:
            return None
        packs[index].append(sequence)
        work_s[index] += cost.whole_s(lengths[sequence])
        tokens[index] += share
    return packs


def _buckets(lengths: Sequence[int], cost: CostModel) -> list[list[int]]:
    """Sequences from long to short, cut where another share of all work is reached."""
    share_s = sum(cost.whole_s(length) for length in lengths) / _BUCKETS
    buckets: list[list[int]] = [[] for _ in range(_BUCKETS)]
    before_s = 0.0
    for sequence in _descending(lengths):
        buckets[min(_BUCKETS - 1, int(before_s / share_s))].append(sequence)
        before_s += cost.whole_s(lengths[sequence])
    return buckets


def _units(descending: Sequence[int], lengths: Sequence[int], capacity: int, ranks: int) -> list[_Unit]:
    """Every long sequence with as few ranks as hold it, then packs of the others."""
    units, short = [], []
    for sequence in descending:
        ring = smallest_ring(lengths[sequence], capacity)
        if ring > ranks:
            raise SequenceTooLong(sequence, lengths[sequence], capacity, ranks)
        if ring > 1:
            units.append(_Unit((sequence,), ring))
        else:
            short.append(sequence)
    return [*units, *(_Unit(pack, 1) for pack in _best_fit(short, lengths, 1, capacity))]


def _append(
    unit: _Unit, members: Sequence[int], lengths: Sequence[int], layout: Layout, ranks: list[list[MicroBatch]]
) -> None:
    """Give every member its share of the unit, with keys and values passed around."""
    ring = tuple(members)
    for index, rank in enumerate(ring):
        pieces = (Piece(i, share_of(lengths[i], len(ring), index).ranges(), ring) for i in unit.sequences)
        ranks[rank].append(_micro_batch(pieces, layout))


def _on_mesh(
    packs: Sequence[Sequence[Pack]], size: int, lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool
) -> Assignment:
    """The packs of every group of ``size`` neighbours, each shared by all of the group."""
    scheme_of = _schemes(size, lengths, layout, cost, pool)
    ranks: list[tuple[MicroBatch, ...]] = []
    for group, of_group in enumerate(packs):
        ring = tuple(range(group * size, (group + 1) * size))
        for index in range(size):
            pieces = (
                [Piece(i, share_of(lengths[i], size, index).ranges(), ring, *scheme_of(i, ring)) for i in pack]
                for pack in of_group
            )
            ranks.append(tuple(_micro_batch(of_pack, layout) for of_pack in pieces))
    return with_fractions(tuple(ranks), lengths, layout, cost)


def _micro_batch(pieces: Iterable[Piece], layout: Layout) -> MicroBatch:
    return MicroBatch(tuple(pieces), recompute=layout.recompute)


def _schemes(
    size: int, lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool
) -> Callable[[int, tuple[int, ...]], tuple[int, bool]]:
    """The heads and the gathering of a sequence in a ring of ``size`` neighbours."""
    coefficients = Coefficients.of(cost, layout, sum(map(cost.whole_s, lengths)))
    node_size, recomputed = _node_size(pool), layout.recompute == "block"

    @functools.cache
    def cheapest(length: int, crosses_nodes: bool) -> tuple[int, bool]:
        return best_sharing(coefficients, length, size, node_size, crosses_nodes, recomputed)[1:]

    return lambda sequence, ring: cheapest(lengths[sequence], size > 1 and pool.crosses_nodes(ring))


def _node_size(pool: Pool) -> int:
    """Ranks of a node; 1 where nodes differ, so that nobody divides heads."""
    sizes = {pool.nodes.count(node) for node in set(pool.nodes)}
    return sizes.pop() if len(sizes) == 1 else 1


__all__ = ["RESTATED", "Baseline", "bytescale_1", "bytescale_2", "packed", "static", "wlb"]
