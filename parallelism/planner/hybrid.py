"""A simple planner for hybrid data and context parallelism: rings for what is long or heavy, packs for the rest.

For a series of target makespans, from the lower bound upwards:
1. every sequence gets the smallest ring that fits its memory and keeps its time under the target (ByteScale's HDP,
   arXiv 2502.21231, section 4, with time in place of tokens);
2. rings are placed, longest first, on the least loaded ranks; whole sequences go to the least loaded rank (LPT) and
   are packed into micro-batches best-fit decreasing (Ding et al., arXiv 2404.10830);
3. packs that fit into the gaps before a ring run there.
The candidate with the smallest simulated makespan is refined by changing one ring at a time. Ties break by index, so the
plan is a pure function of its arguments, the same in every process.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from evermesh.parallelism.batch_plan import BatchPlan, Certificate, MicroBatch, Piece
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.errors import LayoutDoesNotFit, SequenceTooLong
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.pipeline.simulator import critical_share, replay_waves
from evermesh.parallelism.planner.bound import lower_bound, smallest_ring
from evermesh.parallelism.planner.waves import Assignment, align
from evermesh.parallelism.simulator import makespan_s

_TARGETS = (1.0, 1.01, 1.02, 1.04, 1.07, 1.1, 1.15, 1.2, 1.3, 1.5, 1.75, 2.0, 3.0, float("inf"))
"""Target makespans to try, as multiples of the lower bound."""
_REFINEMENT_WORK = 20_000
"""Effort of the refinement: assignments tried, times sequences and ranks; some 0.1 s."""


class Planner(Protocol):
    """Anything that turns the lengths of a batch into a plan; a pure function of them."""

    def plan(self, lengths: Sequence[int]) -> BatchPlan:
        """The plan of a batch with sequences of these lengths (tokens, at least 1)."""
        ...


def plan_batch(lengths: Sequence[int], layout: Layout, cost_model: CostModel, *, speeds_version: int = 0) -> BatchPlan:
    """Plan one batch on ``layout.hdp`` ranks, each of them a whole pipeline where ``layout.pp`` > 1.

    Rings and packs are chosen as for ranks that hold the whole model; pipelines and shared experts then get them in waves.

    Args:
        lengths: tokens of every sequence, each at least 1.
        layout: degrees and the capacity of a micro-batch.
        cost_model: seconds per token, pair, micro-batch and ring step.
        speeds_version: version of the topology's speeds; recorded in the plan.

    Raises:
        SequenceTooLong: a sequence exceeds the capacity of all ranks together.
        LayoutDoesNotFit: a length is not positive.
    """
    for sequence, length in enumerate(lengths):
        if length < 1:
            raise LayoutDoesNotFit(f"sequence {sequence} has {length} tokens; every sequence has at least 1.")
        if smallest_ring(length, layout.capacity) > layout.hdp:
            raise SequenceTooLong(sequence, length, layout.capacity, layout.hdp)
    bound = lower_bound(lengths, layout.hdp, layout.capacity, cost_model)
    search = _Search(lengths, layout, cost_model)
    for factor in _TARGETS:
        search.look_at(tuple(_ring_size(length, layout, cost_model, factor * bound.seconds) for length in lengths))
    search.refine(bound.seconds)
    ranks, seconds = search.best, search.makespan_s
    if layout.runs_in_waves:
        ranks = align(ranks, lengths, layout, cost_model)
        seconds = replay_waves(ranks, lengths, layout, cost_model).makespan_s
        bound = lower_bound(
            lengths, layout.hdp, layout.capacity, cost_model, pp=layout.pp, chain=critical_share(layout)
        )
    return BatchPlan(
        lengths=tuple(lengths),
        capacity=layout.capacity,
        ranks=ranks,
        certificate=Certificate(seconds, bound.seconds, bound.binding),
        planner="hybrid",
        cost_version=cost_model.version,
        speeds_version=speeds_version,
    )


class HybridPlanner:
    """``plan_batch`` with its layout and cost model bound."""

    def __init__(self, layout: Layout, cost_model: CostModel) -> None:
        self.layout, self.cost_model = layout, cost_model

    def plan(self, lengths: Sequence[int]) -> BatchPlan:
        """The plan of a batch; see ``plan_batch``."""
        return plan_batch(lengths, self.layout, self.cost_model)


class _Search:
    """The best assignment among the ring sizes looked at."""

    def __init__(self, lengths: Sequence[int], layout: Layout, cost: CostModel) -> None:
        self.lengths, self.layout, self.cost = lengths, layout, cost
        self.makespan_s = float("inf")
        self.best: Assignment = ()
        self.sizes: tuple[int, ...] = ()
        self._seen: set[tuple[int, ...]] = set()

    def look_at(self, sizes: tuple[int, ...]) -> bool:
        """Assign with these ring sizes, one per sequence; true if that is the best so far."""
        if sizes in self._seen:
            return False
        self._seen.add(sizes)
        assignment = _assign(self.lengths, sizes, self.layout, self.cost)
        seconds = makespan_s(assignment, self.lengths, self.cost)
        better = seconds < self.makespan_s
        if better:
            self.makespan_s, self.best, self.sizes = seconds, assignment, sizes
        return better

    def refine(self, bound_s: float) -> None:
        """Change one ring at a time, longest sequence first, while it helps and the budget of assignments lasts."""
        budget = _REFINEMENT_WORK // (len(self.lengths) + self.layout.hdp)
        descending = sorted(range(len(self.lengths)), key=lambda sequence: (-self.lengths[sequence], sequence))
        improved = True
        while improved:
            improved = False
            for sequence in descending:
                for size in self._other_sizes(sequence):
                    if budget <= 0 or self.makespan_s <= 1.001 * bound_s:
                        return
                    budget -= 1
                    improved |= self.look_at((*self.sizes[:sequence], size, *self.sizes[sequence + 1 :]))

    def _other_sizes(self, sequence: int) -> list[int]:
        length, size = self.lengths[sequence], self.sizes[sequence]
        largest = min(self.layout.hdp, length)
        wanted = {size - 1, size + 1, largest}
        return sorted(other for other in wanted if smallest_ring(length, self.layout.capacity) <= other <= largest)


class _RingStart(NamedTuple):
    """A ring on one of its ranks."""

    gap_s: float
    """Idle time of the rank before the ring starts."""
    micro_batch: MicroBatch


class _Pack(NamedTuple):
    """Whole sequences that one rank runs together."""

    seconds: float
    micro_batch: MicroBatch


def _ring_size(length: int, layout: Layout, cost: CostModel, target_s: float) -> int:
    """The smallest ring that holds ``length`` within the target, else the fastest."""
    first = smallest_ring(length, layout.capacity)
    best, best_s = first, cost.ring_s(length, first)
    for size in range(first + 1, min(layout.hdp, length) + 1):
        if best_s + cost.micro_batch_s <= target_s:
            break
        if (seconds := cost.ring_s(length, size)) < best_s:
            best, best_s = size, seconds
    return best


def _assign(lengths: Sequence[int], sizes: Sequence[int], layout: Layout, cost: CostModel) -> Assignment:
    descending = sorted(range(len(lengths)), key=lambda sequence: (-lengths[sequence], sequence))
    rings = [sequence for sequence in descending if sizes[sequence] > 1]
    whole = [sequence for sequence in descending if sizes[sequence] == 1]
    ring_starts, busy_s = _place_rings(rings, lengths, sizes, layout, cost)
    by_rank = _place_whole(whole, lengths, busy_s, layout, cost)
    return tuple(
        _fill_gaps(starts, _pack(rank, sequences, lengths, layout, cost))
        for rank, (starts, sequences) in enumerate(zip(ring_starts, by_rank, strict=True))
    )


def _place_rings(
    rings: Sequence[int], lengths: Sequence[int], sizes: Sequence[int], layout: Layout, cost: CostModel
) -> tuple[list[list[_RingStart]], list[float]]:
    """Place rings on the ranks that are free first; all members start together. Also the busy time of every rank."""
    starts: list[list[_RingStart]] = [[] for _ in range(layout.hdp)]
    free_at = [0.0] * layout.hdp
    busy_s = [0.0] * layout.hdp
    for sequence in sorted(rings, key=lambda i: (-cost.ring_s(lengths[i], sizes[i]) * sizes[i], i)):
        size = sizes[sequence]
        members = tuple(sorted(heapq.nsmallest(size, range(layout.hdp), key=lambda rank: (free_at[rank], rank))))
        begin = max(free_at[rank] for rank in members)
        duration = cost.ring_s(lengths[sequence], size) + cost.micro_batch_s
        for index, rank in enumerate(members):
            piece = Piece(sequence, share_of(lengths[sequence], size, index).ranges(), members)
            micro_batch = MicroBatch((piece,), recompute=layout.recompute, offload=layout.offload)
            starts[rank].append(_RingStart(begin - free_at[rank], micro_batch))
            free_at[rank] = begin + duration
            busy_s[rank] += duration
    return starts, busy_s


def _place_whole(
    whole: Sequence[int], lengths: Sequence[int], busy_s: Sequence[float], layout: Layout, cost: CostModel
) -> list[list[int]]:
    """Longest processing time first: every sequence to the rank with the least work so far."""
    by_rank: list[list[int]] = [[] for _ in busy_s]
    heap = [(seconds, rank) for rank, seconds in enumerate(busy_s)]
    heapq.heapify(heap)
    for sequence in whole:
        seconds, rank = heapq.heappop(heap)
        by_rank[rank].append(sequence)
        share_of_fixed = cost.micro_batch_s * lengths[sequence] / layout.capacity
        heapq.heappush(heap, (seconds + cost.whole_s(lengths[sequence]) + share_of_fixed, rank))
    return by_rank


def _pack(rank: int, sequences: Sequence[int], lengths: Sequence[int], layout: Layout, cost: CostModel) -> list[_Pack]:
    """Best-fit decreasing: each sequence into the fullest micro-batch that still holds it."""
    packs: list[list[int]] = []
    room: list[int] = []
    for sequence in sequences:
        length = lengths[sequence]
        fitting = [index for index, free in enumerate(room) if free >= length]
        if fitting:
            index = min(fitting, key=lambda i: (room[i], i))
        else:
            index = len(packs)
            packs.append([])
            room.append(layout.capacity)
        packs[index].append(sequence)
        room[index] -= length
    return [
        _Pack(
            cost.micro_batch_s + sum(cost.whole_s(lengths[i]) for i in pack),
            MicroBatch(
                tuple(Piece(i, ((0, lengths[i]),), (rank,)) for i in pack),
                recompute=layout.recompute,
                offload=layout.offload,
            ),
        )
        for pack in packs
    ]


def _fill_gaps(starts: Sequence[_RingStart], packs: Sequence[_Pack]) -> tuple[MicroBatch, ...]:
    """The order of one rank: rings in their common order, packs in the gaps before them where they fit, then the rest."""
    waiting = sorted(packs, key=lambda pack: -pack.seconds)
    ordered: list[MicroBatch] = []
    for start in starts:
        gap_s, too_long = start.gap_s, []
        for pack in waiting:
            if pack.seconds <= gap_s:
                gap_s -= pack.seconds
                ordered.append(pack.micro_batch)
            else:
                too_long.append(pack)
        waiting = too_long
        ordered.append(start.micro_batch)
    return (*ordered, *(pack.micro_batch for pack in waiting))
