"""A time that no plan of a batch can beat under its cost model: the yardstick of every certificate."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.errors import SequenceTooLong
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.costs import Coefficients, best_sharing, is_recomputed, least_in_company_s, linear
from evermesh.parallelism.planner.rings import Floats, Integers
from evermesh.parallelism.planner.sorting import longest_first
from evermesh.parallelism.pool import Pool

Binding = Literal[
    "work", "longest sequence", "memory", "communication", "long sequences in turn", "pipeline", "nothing"
]
"""The constraint that gives a bound."""


class LowerBound(NamedTuple):
    """Seconds, and the constraint that gives them."""

    seconds: float
    binding: Binding


def smallest_ring(length: int, capacity: int) -> int:
    """Fewest ranks whose shares of ``length`` tokens fit into ``capacity``."""
    return -(-length // capacity)


def check_lengths(lengths: Integers, layout: Layout, ranks: int) -> None:
    """Raise unless every sequence fits into all ranks together."""
    if len(lengths) and int(lengths.max()) > layout.capacity * ranks:
        longest = int(lengths.argmax())
        raise SequenceTooLong(longest, int(lengths[longest]), layout.capacity, ranks)


def lower_bound(lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool | None = None) -> LowerBound:
    """The largest of three bounds for ranks that hold the whole model and keep step with nobody.

    - All work, spread over all ranks in proportion to their speeds. A sequence takes its ring together at least the minimum
      over d of d x T(s, d), with a price for offloading that holds however sequences share micro-batches
      (``costs.linear``); every micro-batch holds at most ``capacity`` tokens, so its fixed cost is paid at least
      ceil(tokens / capacity) times. It binds as "work", or as "memory" or "communication" where those make it more than
      the same work without rings would be.
    - The longest sequence on its best ring, on ranks as fast as the fastest.
    - Sequences that need more than half of the ranks run one after the other, beside nothing that needs more than the rest:
      a dual feasible function of ring sizes (Fekete and Schepers, Math. Program. 2001; Lueker 1983).

    Raises:
        SequenceTooLong: a sequence exceeds the capacity of all ranks together.
    """
    pool = pool or Pool.of(layout.hdp)
    array = np.asarray(lengths, np.int64)
    check_lengths(array, layout, len(pool))
    if not len(array):
        return LowerBound(0.0, "nothing")
    ordered = array[longest_first(array)]
    return bound_of(Coefficients.of(cost, layout, 1.0), ordered, np.asarray(pool.speeds), pool.largest_node)


def bound_of(costs: Coefficients, lengths: Integers, speeds: Floats, node_size: int) -> LowerBound:
    """``lower_bound`` of lengths that are known to fit, longest first; there is at least one."""
    priced = [(price, *_all_work(price, lengths, node_size)) for price in linear(costs, lengths)]
    adding, work_s, alone_s = max(priced, key=lambda one: float(one[1].sum()))
    shared_s = float(work_s.sum())
    fixed = -(-int(lengths.sum()) // costs.capacity) * costs.micro_batch_s
    spread = (shared_s + fixed) / float(speeds.sum())
    fastest = float(speeds.max())
    longest = (fastest_s(costs, int(lengths[0]), len(speeds), node_size) + costs.micro_batch_s) / fastest
    in_turn = max(_in_turn(price, lengths, work, speeds, node_size) for price, work, _ in priced)
    if in_turn > max(spread, longest) * (1 + 1e-12):
        return LowerBound(in_turn, "long sequences in turn")
    if longest >= spread:
        return LowerBound(longest, "longest sequence")
    if shared_s <= 1.01 * alone_s:
        return LowerBound(spread, "work")
    return LowerBound(spread, "communication" if _traffic_binds(adding, lengths, node_size, shared_s) else "memory")


@compiled
def least_work_s(costs: Coefficients, length: int, node_size: int) -> float:
    """A lower bound on d x T(length, d) over all rings of d ranks, seconds, without the micro-batch.

    Looks at the smallest rings one by one; what follows costs at least ``_relaxed_work_s``, which grows with d.
    """
    smallest = (length + costs.capacity - 1) // costs.capacity
    if smallest == 1 and costs.keep_capacity >= length:
        alone = least_in_company_s(costs, length, 1, node_size)
        if alone <= _relaxed_work_s(costs, length, 2, node_size):
            return alone * (1 - 1e-12)
    least, last = np.inf, smallest + max(4, smallest // 16)
    for ring in range(smallest, last + 1):
        least = min(least, ring * least_in_company_s(costs, length, ring, node_size))
    return min(least, _relaxed_work_s(costs, length, last + 1, node_size)) * (1 - 1e-12)


@compiled
def _relaxed_work_s(costs: Coefficients, length: int, smallest: int, node_size: int) -> float:
    """Less than d x T(length, d) for every d from ``smallest`` on, seconds.

    What rings add to it grows with d for a given tier, scheme and choice of recomputation; so the smallest ring of each is
    looked at. Padding counts as on one rank, which no ring pads less than.
    """
    kept = smallest
    if costs.keep_capacity > 0:
        kept = max(kept, length // (costs.keep_capacity + 1) + 1)
    padded = (length + costs.tile - 1) // costs.tile * costs.tile
    least = np.inf
    for mode in range(2):
        first = smallest if mode == 0 else kept
        recomputed = is_recomputed(costs, max(1, length // first)) or (mode == 0 and costs.offloads)
        token_s = costs.token_s + (costs.recompute_token_s if recomputed else 0.0)
        pair_s = costs.pair_s + (costs.recompute_pair_s if recomputed else 0.0)
        shown = 1.0
        if recomputed and costs.offloads:
            # one plane of what offloading adds, which is no more than that
            token_s += costs.planes[0][0]
            if pair_s > 0:
                # of time that attention and traffic share, as much is taken off as of attention
                shown = (pair_s + costs.planes[0][1]) / pair_s
                pair_s *= shown
        attention = pair_s * (padded * (padded + 1) / 2)
        for heads in range(1, min(costs.most_heads, node_size) + 1):
            for outside in range(2):
                ring = first if outside == 0 else max(first, node_size + 1)
                ring = (ring + heads - 1) // heads * heads
                groups = ring // heads
                passed_token_s, step_s = costs.ring_token_s, costs.ring_step_s
                if ring > node_size and groups > 1:
                    passed_token_s, step_s = costs.network_token_s, costs.network_step_s
                passed = (groups - 1) * length * passed_token_s * shown
                exchanged = (heads - 1) / heads * length * costs.head_token_s
                steps = groups - 1 + (1 if heads > 1 else 0)
                seconds = ring * costs.piece_s + token_s * length + exchanged
                least = min(least, seconds + max(attention, passed) + ring * steps * step_s)
                if costs.gathers:
                    least = min(least, seconds + attention + passed + ring * min(steps, 2) * step_s)
        if kept == smallest and not costs.offloads:
            break
    return least


@compiled
def _all_work(costs: Coefficients, lengths: Integers, node_size: int) -> tuple[Floats, float]:
    """The least work of every sequence, and what all would be on ranks that hold any number of tokens."""
    work_s, alone = np.empty(len(lengths)), 0.0
    least = 0.0
    for sequence in range(len(lengths)):
        length = lengths[sequence]
        if sequence == 0 or length != lengths[sequence - 1]:
            work_s[sequence] = least = least_work_s(costs, length, node_size)
            if length > costs.capacity:
                least = min(least, best_sharing(costs, length, 1, 1, False, False)[0])
        else:
            work_s[sequence] = work_s[sequence - 1]
        alone += least
    return work_s, alone


@compiled
def fastest_s(costs: Coefficients, length: int, ranks: int, node_size: int) -> float:
    """Seconds of a sequence on its fastest ring of at most ``ranks``."""
    smallest = (length + costs.capacity - 1) // costs.capacity
    best = np.inf
    for ring in range(smallest, ranks + 1):
        best = min(best, least_in_company_s(costs, length, ring, node_size))
    return best


@compiled
def _in_turn(costs: Coefficients, lengths: Integers, work_s: Floats, speeds: Floats, node_size: int) -> float:
    """The largest bound of a family of dual feasible functions, seconds; 0 if no sequence needs more than half of the ranks.
    ``costs`` add up (``costs.linear``): those of sequences in turn are summed, and they may share micro-batches.

    With threshold t a ring of more than R - t ranks counts as all R, one of less than t as none, others as their size.
    """
    ranks = len(speeds)
    needs = (lengths + costs.capacity - 1) // costs.capacity
    best = 0.0
    for need in np.unique(needs[2 * needs > ranks]):
        threshold, total = ranks - need + 1, 0.0
        for sequence in range(len(lengths)):
            if needs[sequence] > ranks - threshold:
                total += ranks * fastest_s(costs, lengths[sequence], ranks, node_size)
            elif needs[sequence] >= threshold:
                total += work_s[sequence]
        best = max(best, total / ranks)
    return (best + costs.micro_batch_s) / speeds.max() if best > 0 else 0.0


def _traffic_binds(costs: Coefficients, lengths: Integers, node_size: int, shared_s: float) -> bool:
    """Whether passing keys and values around adds more than half a percent to the least work."""
    free = costs._replace(ring_token_s=0.0, network_token_s=0.0, ring_step_s=0.0, network_step_s=0.0, head_token_s=0.0)
    return shared_s > 1.005 * float(_all_work(free, lengths, node_size)[0].sum())
