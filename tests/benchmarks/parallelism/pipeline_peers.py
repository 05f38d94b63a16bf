"""Other ways to make micro-batches for pipelines, restated from their papers and sources, in our words.

All of them place rings side by side in waves, since a ring has one index on all its members. None is the other project's
code; what their sources leave open is done in the way that is best for them where that is plain.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from evermesh.parallelism import CostModel, Layout, MicroBatch, Piece
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.pipeline.schedule import Action, PipelineSchedule
from evermesh.parallelism.planner.pipelines import pipelines_s
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.rank_work import Assignment


class Unit(NamedTuple):
    """Sequences that one ring runs together, or one rank."""

    seconds: float
    ring: int
    sequences: tuple[int, ...]


Peer = Callable[[Sequence[int], Layout, CostModel], float]
"""From a batch to the simulated seconds of its pipelines."""


def arrival_order(lengths: Sequence[int], layout: Layout, cost: CostModel) -> float:
    """Packs up to the capacity in the order of arrival; longer sequences on as few ranks as hold them."""
    return _seconds(_in_waves(_packed(range(len(lengths)), lengths, layout, cost), layout), lengths, layout, cost)


def descending(lengths: Sequence[int], layout: Layout, cost: CostModel) -> float:
    """The same packs, largest first, as verl and Megatron's schedulers order them."""
    units = sorted(_packed(range(len(lengths)), lengths, layout, cost), key=lambda unit: -unit.seconds)
    return _seconds(_in_waves(units, layout), lengths, layout, cost)


def pipeline_balance(lengths: Sequence[int], layout: Layout, cost: CostModel) -> float:
    """ByteScale's PP-balance (arXiv 2502.21231, algorithm 2): every pipeline stays at one level of length.

    Sequences are packed from buckets of equal work, longest first, so that packs of a pipeline are alike; each goes to the
    ranks that have had least time so far.
    """
    order = sorted(range(len(lengths)), key=lambda sequence: -lengths[sequence])
    units = sorted(_packed(order, lengths, layout, cost), key=lambda unit: (-unit.ring, -unit.seconds))
    return _seconds(_in_waves(units, layout, by_load=True), lengths, layout, cost)


def equal_counts(lengths: Sequence[int], layout: Layout, cost: CostModel) -> float:
    """The rule of Megatron-LM's draft pull request 2959: every pipeline has m x P micro-batches of about equal work.

    Sequences with more than 1.3 times the mean work of a micro-batch get the nearest power of two of ranks that brings them
    to it; the others go to the micro-batch with least work that has room. Of all m, the one whose simulation ends first.
    """
    return min((_equal(lengths, layout, cost, number * layout.pp) for number in range(1, 13)), default=float("inf"))


def _packed(order: Sequence[int], lengths: Sequence[int], layout: Layout, cost: CostModel) -> list[Unit]:
    units: list[Unit] = []
    open_pack: list[int] = []
    for sequence in order:
        if lengths[sequence] > layout.capacity:
            ring = -(-lengths[sequence] // layout.capacity)
            units.append(Unit(cost.ring_s(lengths[sequence], ring), ring, (sequence,)))
            continue
        if sum(lengths[i] for i in open_pack) + lengths[sequence] > layout.capacity:
            units.append(_pack(open_pack, lengths, cost))
            open_pack = []
        open_pack.append(sequence)
    return [*units, _pack(open_pack, lengths, cost)] if open_pack else units


def _pack(sequences: Sequence[int], lengths: Sequence[int], cost: CostModel) -> Unit:
    return Unit(sum(cost.whole_s(lengths[i]) for i in sequences), 1, tuple(sequences))


def _in_waves(units: Sequence[Unit], layout: Layout, *, by_load: bool = False) -> list[dict[int, Unit]]:
    """Every unit into the first wave with ranks left, on its first free ranks, or those with least work so far."""
    waves: list[dict[int, Unit]] = []
    busy = [0.0] * layout.hdp
    first_open = 0
    for unit in units:
        at = first_open
        while at < len(waves) and layout.hdp - len(waves[at]) < unit.ring:
            at += 1
        if at == len(waves):
            waves.append({})
        free = [rank for rank in range(layout.hdp) if rank not in waves[at]]
        if by_load:
            free.sort(key=lambda rank: busy[rank])
        for rank in free[: unit.ring]:
            waves[at][rank] = unit
            busy[rank] += unit.seconds
        while first_open < len(waves) and len(waves[first_open]) == layout.hdp:
            first_open += 1
    return waves


def _seconds(waves: Sequence[dict[int, Unit]], lengths: Sequence[int], layout: Layout, cost: CostModel) -> float:
    last = {rank: index for index, wave in enumerate(waves) for rank in wave}
    assignment: Assignment = tuple(
        tuple(_micro_batch(rank, wave, lengths) for wave in waves[: last.get(rank, -1) + 1])
        for rank in range(layout.hdp)
    )
    return pipelines_s(assignment, lengths, layout, cost, Pool.of(layout.hdp))


def _micro_batch(rank: int, wave: dict[int, Unit], lengths: Sequence[int]) -> MicroBatch:
    if rank not in wave:
        return MicroBatch(())
    unit = wave[rank]
    ring = tuple(sorted(member for member, other in wave.items() if other is unit))
    share = ring.index(rank)
    return MicroBatch(tuple(Piece(i, share_of(lengths[i], len(ring), share).ranges(), ring) for i in unit.sequences))


def _equal(lengths: Sequence[int], layout: Layout, cost: CostModel, number: int) -> float:
    work = [cost.whole_s(length) for length in lengths]
    target = sum(work) / (number * layout.hdp)
    units: list[Unit] = []
    rest: list[int] = []
    for sequence in sorted(range(len(lengths)), key=lambda i: -work[i]):
        fewest = -(-lengths[sequence] // layout.capacity)
        if work[sequence] <= 1.3 * target and fewest == 1:
            rest.append(sequence)
            continue
        ring = min(layout.hdp, max(_power_of_two_above(fewest), 1 << round(np.log2(max(1.0, work[sequence] / target)))))
        units.append(Unit(cost.ring_s(lengths[sequence], ring), ring, (sequence,)))
    free = number * layout.hdp - sum(unit.ring for unit in units)
    packs = _levelled(rest, lengths, work, layout.capacity, free)
    waves = None if packs is None else _in_waves([*units, *(_pack(pack, lengths, cost) for pack in packs)], layout)
    return float("inf") if waves is None else _seconds(waves, lengths, layout, cost)


def _levelled(
    sequences: Sequence[int], lengths: Sequence[int], work: Sequence[float], capacity: int, number: int
) -> list[list[int]] | None:
    """Longest processing time first into ``number`` micro-batches; None when they do not hold everything."""
    packs: list[list[int]] = [[] for _ in range(max(number, 0))]
    heap = [(0.0, index, 0) for index in range(len(packs))]
    for sequence in sequences:
        full = []
        while heap and heap[0][2] + lengths[sequence] > capacity:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        seconds, index, tokens = heapq.heappop(heap)
        packs[index].append(sequence)
        for entry in [*full, (seconds + work[sequence], index, tokens + lengths[sequence])]:
            heapq.heappush(heap, entry)
    return [pack for pack in packs if pack]


def _power_of_two_above(number: int) -> int:
    return 1 << (number - 1).bit_length()


def best_sizes_s(schedule: PipelineSchedule, number: int, work_s: float, fixed_s: float, longest_s: float) -> float:
    """Least seconds of one pipeline over all sizes of ``number`` micro-batches with this much work together.

    A linear program, since with a given order every start is a longest path. Each micro-batch has ``fixed_s`` on top, and at
    most ``longest_s`` of the work; backward passes are not split. No plan with as many micro-batches ends before.
    """
    actions = [schedule.actions(rank, number) for rank in range(schedule.ranks)]
    variable = {action: number + i for i, action in enumerate(a for order in actions for a in order)}
    end = number + len(variable)
    waits: list[tuple[Action, int]] = []
    for order in actions:
        waits += [(one, variable[other]) for one, other in itertools.pairwise(order)] + [(order[-1], end)]
    for action in variable:
        message = schedule.received(action)
        if message is not None:
            before = action.stage - 1 if message.direction == "forward" else action.stage + 1
            waits.append((Action(action.kind, before, action.micro_batch), variable[action]))
    share = np.array([(1 if a.kind == "forward" else 2) / (3 * schedule.num_stages) for a, _ in waits])
    row = np.arange(len(waits))
    columns = [[variable[a] for a, _ in waits], [a.micro_batch for a, _ in waits], [other for _, other in waits]]
    values = np.concatenate([np.ones(len(waits)), share, -np.ones(len(waits))])
    at_most = coo_matrix((values, (np.tile(row, 3), np.concatenate(columns))), shape=(len(waits), end + 1))
    together = coo_matrix((np.ones(number), (np.zeros(number, int), np.arange(number))), shape=(1, end + 1))
    cost = np.zeros(end + 1)
    cost[end] = 1.0
    bounds = [(0.0, longest_s)] * number + [(0.0, None)] * (len(variable) + 1)
    found = linprog(cost, at_most, -share * fixed_s, together, [work_s], bounds=bounds, method="highs-ipm")
    return float(found.fun) if found.success else float("inf")
