"""Plans for ranks that keep step: everything a group runs at once begins and ends together, so waves have to be level.

Ranks that share experts, or gather parameters block by block, wait for the longest of them in every micro-batch. A wave
costs its group the time of its longest micro-batch, so a wave is good when all its ranks are busy until its end:

- a duration is chosen for the wave, that with which it does most necessary work per rank and second;
- from long to short every sequence gets the smallest ring that ends within it, so that heavy sequences get more ranks than
  their memory needs, and what is light is packed into micro-batches of about that duration, also beside others of one ring;
- waves go to the group that is free first, within a target for the end of the step, which falls by bisection; wide rings,
  which join groups, come before narrow ones, so that nobody gets a step only to keep in step;
- at the end, durations of waves are changed at random as long as the effort lasts.

Groups run waves of their own at their own times: one with many short sequences beside one with few long ones. The result
is a pure function of the arguments: times are integer ticks, ties break by index, random numbers are our own.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from evermesh.parallelism.batch_plan import MicroBatch
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.errors import SequenceTooLong
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner.bound import LowerBound, smallest_ring
from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.costs import Coefficients, best_sharing, least_shared_s, linear, shared_s, ticks
from evermesh.parallelism.planner.fractions import with_fractions
from evermesh.parallelism.planner.lock_step_filling import NEVER, Integers, Problem
from evermesh.parallelism.planner.lock_step_loops import Waves, search
from evermesh.parallelism.planner.lock_step_places import Wave, place
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.rank_work import Assignment

Seconds = npt.NDArray[np.float64]
_EFFORT = 30_000
"""Sequences placed while durations are changed; some 0.1 s with 512 ranks."""
_EVERY_DEGREE = 16
"""Up to so many ranks rings may have any size; above, sizes grow by a twelfth, beside those that memory asks for."""
_LEAST_SHARE = 64
"""Tokens that rings of large capacities give their members at least, but where memory asks for the ring."""
_ALMOST_NEVER = 2.0**58
"""Ticks; no sum of times is as long."""
_SLOW = 0.95
"""Ranks below this part of the fastest rank's speed are slow: they run no rings, where everything fits without them."""


def plan_lock_step(
    lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool, effort: float = 1.0
) -> Assignment:
    """The micro-batches of every HDP rank of a layout without pipeline whose ranks keep step.

    ``effort`` is the part of the full search that is made.

    Raises:
        SequenceTooLong: all ranks together cannot hold a sequence.
    """
    _check_lengths(lengths, layout, pool)
    if not lengths:
        return ((),) * len(pool)
    tries = int(effort * _EFFORT) // len(lengths)
    found = [_search(lengths, layout, cost, pool, costs, tries) for costs in _choices(lengths, layout, cost, pool)]
    _, waves = min(found, key=lambda one: one[0])
    return _assignment(waves, lengths, layout, cost, pool)


def lock_step_bound(lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool) -> LowerBound:
    """A time that no plan of ranks that keep step can beat: all work spread evenly, or what the longest sequence needs.

    - Work: a sequence costs its ring at least min over d of d x T(s, d). A wave costs all ranks of its group the fixed time
      of a micro-batch and holds their capacity, so with groups of g ranks at least ceil(tokens / (g x capacity)) waves
      are paid, g times each.
    - The longest sequence takes its time on its best ring. On a ring of d ranks it keeps all ranks of the ceil(d / g) groups
      busy or waiting for as long; the other ranks of these hold no more than their capacity, at best the sequences with
      most work per token. What they must wait is added to the work, for the d with which the sum is least.

    Where ranks differ in speed, sums are divided by all speeds together, and waiting is left out.

    Raises:
        SequenceTooLong: all ranks together cannot hold a sequence.
    """
    _check_lengths(lengths, layout, pool)
    if not lengths:
        return LowerBound(0.0, "nothing")
    costs, given = Coefficients.of(cost, layout, 1.0), np.array(lengths, np.int64)
    distinct, numbers = np.unique(given, return_counts=True)
    node_size, group, ranks = pool.largest_node, _group_size(layout, len(pool)), len(pool)
    prices = [
        (np.array([_least(adding, length, ranks, node_size, True) for length in distinct]), adding)
        for adding in linear(costs, given)
    ]
    work_s, adding = max(prices, key=lambda price: float(numbers @ price[0]))
    tokens = sum(lengths)
    fixed_s = group * -(-tokens // (group * layout.capacity)) * cost.micro_batch_s
    speeds = math.fsum(pool.speeds)
    spread_s = (float(numbers @ work_s) + fixed_s) / speeds
    alone_s = cost.micro_batch_s + _least(costs, distinct[-1], ranks, node_size, False)
    longest_s = alone_s / max(pool.speeds)
    if min(pool.speeds) == max(pool.speeds):
        numbers[-1] -= 1
        waiting_s = _least_waiting(adding, distinct, numbers, work_s, ranks, node_size, group)
        longest_s = max(longest_s, spread_s + waiting_s / speeds)
    if longest_s > 1.01 * spread_s:
        return LowerBound(longest_s, "longest sequence")
    whole_s = np.array([min(cost.whole_s(int(length)), least) for length, least in zip(distinct, work_s, strict=True)])
    numbers[-1] += min(pool.speeds) == max(pool.speeds)
    unconstrained_s = (float(numbers @ whole_s) + cost.micro_batch_s) / speeds
    return LowerBound(max(spread_s, longest_s), "work" if spread_s <= 1.01 * unconstrained_s else "memory")


@compiled
def _least_waiting(
    costs: Coefficients,
    distinct: Integers,
    numbers: Integers,
    work_s: Seconds,
    ranks: int,
    node_size: int,
    group: int,
) -> float:
    """Seconds that ranks together wait for the longest sequence at least; ``numbers`` are of what may run beside it.

    ``costs`` add up (``costs.linear``): more may be in the micro-batches of the longest, too.
    """
    length, recomputed = distinct[len(distinct) - 1], costs.keep_capacity == 0
    by_intensity = np.argsort(-(work_s / distinct), kind="mergesort")
    least = np.inf
    for ring in range((length + costs.capacity - 1) // costs.capacity, min(ranks, length) + 1):
        seconds = least_shared_s(costs, length, ring, node_size, recomputed)
        block = (ring + group - 1) // group * group
        room, beside_s = (block - ring) * costs.capacity, 0.0
        for i in by_intensity:
            held = min(room, numbers[i] * distinct[i])
            beside_s += work_s[i] / distinct[i] * held
            room -= held
            if room == 0:
                break
        beside_s = min(beside_s, (block - ring) * seconds)
        least = min(least, block * seconds - beside_s - work_s[len(work_s) - 1])
    return max(0.0, least)


@compiled
def _least(costs: Coefficients, length: int, ranks: int, node_size: int, together: bool) -> float:
    """Seconds of a sequence on its best ring, of all members ``together`` or of each."""
    recomputed = costs.keep_capacity == 0
    first = (length + costs.capacity - 1) // costs.capacity
    if together and first == 1:
        return shared_s(costs, length, 1, 1, False, False, recomputed)  # sharing only adds to the work
    least = np.inf
    for ring in range(first, min(ranks, max(first, length)) + 1):
        seconds = least_shared_s(costs, length, ring, node_size, recomputed)
        least = min(least, ring * seconds if together else seconds)
    return least


def _check_lengths(lengths: Sequence[int], layout: Layout, pool: Pool) -> None:
    for sequence, length in enumerate(lengths):
        if smallest_ring(length, layout.capacity) > len(pool):
            raise SequenceTooLong(sequence, length, layout.capacity, len(pool))


def _choices(lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool) -> Iterator[Coefficients]:
    """Costs with the whole capacity, and, where small micro-batches keep their activations, with as much as they may hold."""
    costs = Coefficients.of(cost, layout, 1.0)
    yield costs if costs.keep_capacity == costs.capacity else costs._replace(keep_capacity=0)
    if 0 < costs.keep_capacity < costs.capacity and max(lengths) <= costs.keep_capacity * len(pool):
        yield costs._replace(capacity=costs.keep_capacity)


def _search(
    lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool, costs: Coefficients, tries: int
) -> tuple[float, list[Wave]]:
    """When the waves found end, in seconds, and the waves; durations are changed at random so many ``tries``."""
    descending = sorted(range(len(lengths)), key=lambda sequence: -lengths[sequence])
    ordered = np.array([lengths[sequence] for sequence in descending], np.int64)
    blocks, ranks = _blocks(layout, len(pool)), _ranks(layout, len(pool))
    degrees = _degrees(ordered, costs.capacity, blocks)
    seconds_NK, crossing_NK = _tables(costs, ordered, degrees, pool.largest_node)
    areas_s = (seconds_NK * degrees).min(1)
    total_s = float(areas_s.sum()) + len(lengths) * cost.micro_batch_s
    costs = costs._replace(ticks_per_s=2.0 ** (50 - math.frexp(total_s)[1]))
    fastest, speeds = _speeds([pool.speeds[rank] for rank in ranks])
    problem = Problem(
        lengths=ordered,
        degrees=degrees,
        ticks_NK=_as_ticks(seconds_NK, costs.ticks_per_s),
        crossing_NK=_as_ticks(crossing_NK, costs.ticks_per_s),
        areas=(areas_s * costs.ticks_per_s + 0.5).astype(np.int64),
        capacity=costs.capacity,
        fixed=ticks(costs, cost.micro_batch_s),
        blocks=np.array(blocks, np.int64),
        smallest=0,
        nodes=np.unique(np.array(pool.nodes)[ranks], return_inverse=True)[1].astype(np.int64),
        speeds=speeds,
    )
    end, waves = search(problem, int(problem.areas.sum() * 1024 // speeds.sum()), tries)
    end_s = end / fastest / costs.ticks_per_s
    if speeds.min() < 1024:  # where slow ranks are left out of rings nothing may fit, or too little
        even = problem._replace(speeds=np.full_like(speeds, 1024))
        end, even_waves = search(even, int(problem.areas.sum() // len(pool)), tries)
        if end / min(pool.speeds) / costs.ticks_per_s < end_s:
            end_s, waves = end / min(pool.speeds) / costs.ticks_per_s, even_waves
    assert waves.counts[1] > 0, "no waves were found"
    return end_s, list(_waves(waves, descending, ranks))


def _waves(found: Waves, descending: Sequence[int], ranks: Sequence[int]) -> Iterator[Wave]:
    num_bins, num_waves = found.counts.tolist()
    contents: list[list[int]] = [[] for _ in range(num_bins)]
    for sequence, at in zip(descending, found.bin_of.tolist(), strict=True):
        contents[at].append(sequence)
    in_wave: list[list[int]] = [[] for _ in range(num_waves)]
    for at, wave in enumerate(found.wave_of[:num_bins].tolist()):
        if contents[at]:
            in_wave[wave].append(at)
    for wave, bins in enumerate(in_wave):
        start, size = int(found.starts[wave]), int(found.sizes[wave])
        slow = {ranks[found.slow_of[at]]: contents[at] for at in bins if found.slow_of[at] >= 0}
        rings = [(int(found.degree_of[at]), contents[at]) for at in bins if found.slow_of[at] < 0]
        yield Wave(tuple(ranks[start : start + size]), rings, slow)


def _assignment(
    waves: Sequence[Wave], lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool
) -> Assignment:
    costs = Coefficients.of(cost, layout, 1.0)
    in_groups = {rank for group in layout.lock_step_groups for rank in group}
    micro_batches: list[list[MicroBatch]] = [[] for _ in range(len(pool))]
    for wave in waves:
        placed = place(wave, lengths, layout, costs, pool)
        choice: Literal["none", "block"] = "none" if placed.keeps else "block"
        for rank, pieces in placed.pieces.items():
            step = len(micro_batches[rank]) if rank in in_groups else None
            micro_batches[rank].append(MicroBatch(pieces, choice, lock_step=step))
    return with_fractions(tuple(map(tuple, micro_batches)), lengths, layout, cost)


def _ranks(layout: Layout, number: int) -> list[int]:
    """All ranks, those of a group side by side."""
    if _group_size(layout, number) == number:
        return list(range(number))
    return [rank for group in layout.lock_step_groups for rank in group]


def _group_size(layout: Layout, number: int) -> int:
    """Ranks of a group; where groups differ in size, all ranks keep step."""
    groups = layout.lock_step_groups
    if not groups:
        return 1
    sizes = {len(group) for group in groups}
    return sizes.pop() if len(sizes) == 1 and len(groups) * len(groups[0]) == number else number


def _blocks(layout: Layout, number: int) -> list[int]:
    """Ranks of blocks, from all to one group, each a divisor of the one before."""
    blocks = [number]
    while blocks[-1] > _group_size(layout, number):
        groups = blocks[-1] // _group_size(layout, number)
        blocks.append(blocks[-1] // next(part for part in range(2, groups + 1) if groups % part == 0))
    return blocks


def _degrees(descending: Integers, capacity: int, blocks: Sequence[int]) -> Integers:
    """Sizes that rings may have."""
    number = blocks[0]
    sizes = {*range(1, min(number, _EVERY_DEGREE) + 1), *blocks}
    size = _EVERY_DEGREE
    while (size := size + size // 12) < number:
        sizes.add(size)
    return np.array(sorted(sizes | {smallest_ring(length, capacity) for length in descending.tolist()}), np.int64)


@compiled
def _tables(costs: Coefficients, lengths: Integers, degrees: Integers, node_size: int) -> tuple[Seconds, Seconds]:
    """Seconds of every member, by sequence and degree; infinite where a ring is too small or large.

    First inside a node, as far as a node has room; then across nodes, where small rings divide no heads.
    """
    seconds_NK = np.full((len(lengths), len(degrees)), np.inf)
    crossing_NK = np.full((len(lengths), len(degrees)), np.inf)
    recomputed = costs.keep_capacity == 0
    share = max(1, min(_LEAST_SHARE, costs.capacity // 32))
    for i in range(len(lengths)):
        length = lengths[i]
        least = (length + costs.capacity - 1) // costs.capacity
        for k in range(len(degrees)):
            degree = degrees[k]
            if degree > least and degree * share > length:
                break
            if degree < least:
                continue
            seconds = best_sharing(costs, length, degree, node_size, degree > node_size, recomputed)[0]
            seconds_NK[i, k] = crossing_NK[i, k] = seconds
            if 1 < degree <= node_size:
                crossing_NK[i, k] = best_sharing(costs, length, degree, 1, True, recomputed)[0]
    return seconds_NK, crossing_NK


def _as_ticks(seconds_NK: Seconds, ticks_per_s: float) -> Integers:
    ticks_NK = (np.minimum(seconds_NK * ticks_per_s, _ALMOST_NEVER) + 0.5).astype(np.int64)
    ticks_NK[ticks_NK >= _ALMOST_NEVER] = NEVER
    return ticks_NK


def _speeds(speeds: Sequence[float]) -> tuple[float, Integers]:
    """The speed of rings, and every rank's in 1024ths of it, at most 1024."""
    whole = min(speed for speed in speeds if speed >= _SLOW * max(speeds))
    return whole, np.array([min(1024, int(1024 * speed / whole)) for speed in speeds], np.int64)


__all__ = ["lock_step_bound", "plan_lock_step"]
