"""A time that no plan of a batch for pipelines can beat under its cost model."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner.bound import LowerBound
from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.costs import Coefficients, is_recomputed, least_in_company_s, least_shared_s, linear
from evermesh.parallelism.planner.pipelines.problem import Floats, Integers, check_batch
from evermesh.parallelism.pool import Pool


def pipeline_bound(lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool) -> LowerBound:
    """The larger of two bounds, for any number, contents and order of micro-batches; compare ``planner.bound``.

    Work, and the time until a pipeline is full and empty again. With P ranks and S stages in each pipeline, rank P - 1 holds
    no stage before stage P - 1. Its first action on a micro-batch with tokens comes after P - 1 stages forward of that
    micro-batch, and, unless gradients of weights are put off, P - 1 stages backward come after its last. Both are at least
    those of the smallest micro-batch that any plan can have: one sequence, or its share on any ring. In between, the rank
    does a P-th of its pipeline's work. So k pipelines with speeds v take at least
    (work / P + k (P - 1) (f + b) / S) / sum of v; the bound is the least over k, of the k fastest.

    Longest sequence: on its best ring, from the first action to the last that cannot be put off.

    Raises:
        SequenceTooLong: a sequence exceeds the capacity of all ranks together.
        LayoutDoesNotFit: a length is not positive, or the pool has another number of ranks.
    """
    check_batch(lengths, layout, pool)
    if not lengths:
        return LowerBound(0.0, "nothing")
    schedule = layout.pipeline
    speeds = np.sort(np.array(pool.speeds))[::-1].copy()
    distinct, counts = np.unique(np.array(lengths, dtype=np.int64), return_counts=True)
    last_weights = 1.0 / schedule.num_stages if schedule.splits_backward else 1.0
    costs = Coefficients.of(cost, layout, 1.0)
    found = (
        _Least(*_least(costs, adding, distinct, speeds, pool.largest_node, last_weights))
        for adding in linear(costs, np.repeat(distinct, counts))
    )
    least = max(found, key=lambda one: float(one.area @ counts))
    fixed_s = math.ceil(sum(lengths) / layout.capacity) * cost.micro_batch_s
    work_s = math.fsum((least.area * counts).tolist()) + fixed_s
    unconstrained_s = math.fsum((least.area_alone * counts).tolist()) + cost.micro_batch_s
    passes_s = float(least.forward.min() + (0.0 if schedule.splits_backward else least.backward.min()))
    ends_s = (schedule.ranks - 1) * passes_s / schedule.num_stages
    spread, free = (_spread(seconds / schedule.ranks, ends_s, speeds) for seconds in (work_s, unconstrained_s))
    longest = float(least.alone.max())
    if longest >= spread:
        return LowerBound(longest, "longest sequence")
    return LowerBound(spread, "work" if spread <= 1.01 * free else "memory")


class _Least(NamedTuple):
    """Seconds that a sequence of every length takes at least, over all rings and ways to share."""

    area: Floats
    """All members together, without the fixed cost."""
    area_alone: Floats
    """The same if one rank could hold it."""
    alone: Floats
    """From the first action of its micro-batch to the last that cannot be put off."""
    forward: Floats
    """A micro-batch that holds only its share forward, all stages."""
    backward: Floats


def _spread(work_s: float, ends_s: float, speeds: Floats) -> float:
    """The least over the number of pipelines in use."""
    total = np.cumsum(speeds)
    number = np.arange(1, len(speeds) + 1)
    return float(((work_s + number * ends_s) / total).min())


@compiled
def _least(
    costs: Coefficients,
    adding: Coefficients,
    lengths: Integers,
    speeds: Floats,
    largest_node: int,
    last_weights: float,
) -> tuple[Floats, Floats, Floats, Floats, Floats]:
    """The fields of ``_Least``.

    Areas are those of ``adding``, one of ``costs.linear``; ``speeds`` fall; ``last_weights`` is the part of the weights'
    gradients that ends a step.
    """
    area, area_alone = np.empty(lengths.size), np.empty(lengths.size)
    alone, forward, backward = np.empty(lengths.size), np.empty(lengths.size), np.empty(lengths.size)
    for index in range(lengths.size):
        length = lengths[index]
        area[index] = alone[index] = forward[index] = backward[index] = np.inf
        first = (length + costs.capacity - 1) // costs.capacity
        for ring in range(first, min(speeds.size, length) + 1):
            recomputed = is_recomputed(costs, (length + ring - 1) // ring)
            seconds = least_shared_s(costs, length, ring, largest_node, recomputed)
            fewest = 4.0 if recomputed else 3.0
            most = 4.0 if costs.keep_capacity < costs.capacity else 3.0  # others in its micro-batch may need it
            whole = seconds + costs.micro_batch_s
            area_s = least_in_company_s(adding, length, ring, largest_node) if costs.offloads else seconds
            area[index] = min(area[index], ring * area_s)
            chain = (fewest - 1.0 + last_weights) / fewest
            alone[index] = min(alone[index], chain * whole / speeds[ring - 1])
            forward[index] = min(forward[index], whole / most)
            backward[index] = min(backward[index], whole * (fewest - 1.0) / fewest)
        area_alone[index] = min(area[index], least_in_company_s(adding, length, 1, largest_node))
    return area, area_alone, alone, forward, backward


__all__ = ["pipeline_bound"]
