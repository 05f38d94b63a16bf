"""Plans for ranks that hold the whole model and keep step with nobody: rings of any size for what is long, packs for others.

For a series of target times, from the lower bound upwards, until rings can be placed so that they end by the target
(``rings``): whole sequences fill the gaps and level the ends (``filling``), and the better of two ways to stack rings becomes
the plan (``assembling``). All loops are compiled and count in integer ticks; ties break by index, so the plan is a pure
function of its arguments, the same in every process.
"""

from typing import NamedTuple

import numpy as np

from evermesh.parallelism.batch_plan import Certificate, PackedRanks
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner.assembling import Columns, assemble, renamed
from evermesh.parallelism.planner.bound import bound_of, least_work_s
from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.costs import Coefficients, shared_s, ticks
from evermesh.parallelism.planner.effort import effort_of
from evermesh.parallelism.planner.few_ranks import EFFORT, MOST_RANKS, search
from evermesh.parallelism.planner.filling import Filling, Slots, fill, level, slots_between
from evermesh.parallelism.planner.fractions import with_offload
from evermesh.parallelism.planner.problem import Problem
from evermesh.parallelism.planner.rings import FOREVER, Floats, Integers, Rings, place_rings
from evermesh.parallelism.planner.sorting import longest_first
from evermesh.parallelism.pool import Pool

_TARGETS = (
    1.0,
    1.003,
    1.006,
    1.01,
    1.015,
    1.022,
    1.03,
    1.045,
    1.065,
    1.1,
    1.15,
    1.2,
    1.3,
    1.4,
    1.6,
    2.0,
    3.0,
    6.0,
    1e3,
)
"""Target times to try, as multiples of the lower bound, until the rings fit."""
_GOOD_ENOUGH = 1.0015
"""Of the target."""
_SLOW = 0.995
"""Of the speed of the fastest rank; slower ranks are tried behind all others."""
_MOST_SEARCHED = 256
"""Sequences up to which plans for few ranks are searched."""
_LEVELLING, _LEVELLING_EACH = 100_000, 3
"""Comparisons to spend on exchanges between ranks, and as many more for every sequence; a few milliseconds."""
_LEVELS_ALL = 0.3
"""Share of whole sequences in all work from which they level whatever rings leave."""


def plan_rings(
    lengths: Integers, layout: Layout, cost: CostModel, pool: Pool, effort: float | None = None
) -> tuple[PackedRanks, Certificate]:
    """The plan of ``lengths``, which fit, for ranks that hold the whole model and keep step with nobody.

    Inside, sequences are numbered from long to short: loops then pass over memory in order, and equals are neighbours.
    ``effort`` is for few ranks, see ``plan_batch``.
    """
    if not len(lengths):
        return PackedRanks.of([()] * len(pool), ()), Certificate(0.0, 0.0, "nothing")
    speeds, by_length = np.asarray(pool.speeds), longest_first(lengths)
    ordered = lengths[by_length]
    bound = bound_of(Coefficients.of(cost, layout, 1.0), ordered, speeds, pool.largest_node)
    effort = effort_of(bound.seconds) if effort is None else effort
    costs = Coefficients.of(cost, layout, bound.seconds * len(pool))
    makespan, best = FOREVER, None
    for order in _orders(speeds):
        nodes = np.asarray(pool.nodes, np.int64)[order]
        problem = Problem(
            costs=costs,
            lengths=ordered,
            slowness=1.0 / speeds[order],
            node_of=nodes,
            node_end=_node_ends(nodes),
            node_size=pool.largest_node,
        )
        for pack in pack_sizes(costs):
            columns, end = _search(problem, pack, bound.seconds, layout.most_peers, effort)
            if end < makespan:
                makespan, best = end, _in_order(columns, order)
    assert best is not None, "some order of the ranks gives a plan"
    ranks = with_offload(lengths, renamed(best, by_length), layout, cost)
    return ranks, Certificate(makespan / costs.ticks_per_s, bound.seconds, bound.binding)


def _orders(speeds: Floats) -> list[Integers]:
    """In which order ranks are laid out for rings, which take neighbours: as they are; and slow ranks behind all others.

    A ring is as slow as its slowest member. Few ranks need no neighbours.
    """
    as_they_are = np.arange(len(speeds))
    slow = speeds < _SLOW * speeds.max()
    if len(speeds) <= MOST_RANKS or not slow.any():
        return [as_they_are]
    return [as_they_are, np.argsort(np.where(slow, -speeds, -2 * speeds.max()), kind="stable")]


def _node_ends(nodes: Integers) -> Integers:
    """Of every rank, the first behind it that is in another node."""
    ends = np.append(np.flatnonzero(np.diff(nodes)) + 1, len(nodes))
    return ends[np.searchsorted(ends, np.arange(len(nodes)), side="right")]


def _in_order(columns: Columns, order: Integers) -> Columns:
    """The columns with rank ``order[r]`` in place of rank r."""
    if (order == np.arange(len(order))).all():
        return columns
    rank_of = np.repeat(order, np.diff(columns.rank_start))
    micro_batches = np.argsort(rank_of, kind="stable")
    pieces_in = np.diff(columns.micro_batch_start)
    place = np.empty(len(micro_batches), np.int64)
    place[micro_batches] = np.arange(len(micro_batches))
    pieces = np.argsort(np.repeat(place, pieces_in), kind="stable")
    return columns._replace(
        rank_start=np.searchsorted(rank_of[micro_batches], np.arange(len(order) + 1)),
        micro_batch_start=np.append(0, np.cumsum(pieces_in[micro_batches])),
        sequence=columns.sequence[pieces],
        ring=order[columns.ring],
        recomputed=columns.recomputed[micro_batches],
    )


def pack_sizes(costs: Coefficients) -> tuple[int, ...]:
    """Tokens to which whole sequences may be packed: all that a rank holds, and as many as need no recomputation."""
    return tuple({costs.capacity, costs.keep_capacity or costs.capacity})


class _Outcome(NamedTuple):
    rings: Rings
    slots: Slots
    filling: Filling
    end: int
    fits: bool


def _search(problem: Problem, pack: int, bound_s: float, most_peers: int | None, effort: float) -> tuple[Columns, int]:
    """The columns of the best plan with packs of at most so many tokens, and its makespan in ticks."""
    work, alone = _times(problem.costs, problem.lengths, problem.node_size, pack)
    bound = ticks(problem.costs, bound_s)
    best: _Outcome | None = None
    for factor in _TARGETS:
        found = _Outcome(*_attempt(problem, work, alone, int(bound * factor), pack))
        if found.fits:
            best = found
            break
    assert best is not None, "rings that follow each other always fit into a thousand times the bound"
    if len(problem.slowness) <= MOST_RANKS and effort > 0:
        searched = _assembled(problem, alone, _searched(problem, alone, bound, pack, best, effort), pack)
        if most_peers is None or _peers(searched[0]) <= most_peers:
            return searched
    return _assembled(problem, alone, best, pack)


def _assembled(problem: Problem, alone: Integers, found: _Outcome, pack: int) -> tuple[Columns, int]:
    """The columns, and when the last rank is done, ticks."""
    columns, makespan = assemble(
        problem.costs,
        problem.lengths,
        alone,
        found.rings,
        found.slots,
        found.filling,
        problem.slowness,
        problem.node_of,
        problem.node_size,
        pack,
    )
    return columns, makespan


def _peers(columns: Columns) -> int:
    """With how many ranks some rank passes keys and values around."""
    peers: dict[int, set[int]] = {}
    for sequence in np.flatnonzero(np.diff(columns.ring_start) > columns.heads):
        ring = columns.ring[columns.ring_start[sequence] : columns.ring_start[sequence + 1]].tolist()
        heads = int(columns.heads[sequence])
        for one, other in zip(ring, ring[heads:] + ring[:heads], strict=True):
            peers.setdefault(one, set()).add(other)
            peers.setdefault(other, set()).add(one)
    return max(map(len, peers.values()), default=0)


def _searched(problem: Problem, alone: Integers, bound: int, pack: int, first: _Outcome, effort: float) -> _Outcome:
    """The best of ``first`` and of what searches find from five beginnings."""
    effort *= EFFORT / 4
    if first.end * 2000 <= bound * 2001 or len(problem.lengths) > _MOST_SEARCHED:
        return first
    ranks, count = len(problem.slowness), len(problem.lengths)
    smallest = (problem.lengths + problem.costs.capacity - 1) // problem.costs.capacity
    best = first
    # what was placed, all shared by everybody, nothing shared that need not be, and the best of these where order counts;
    # and what packs alone can do, which a search from rings does not come back to
    starts = (
        (None, False, 2),
        (np.full(count, ranks), False, 1),
        (smallest, True, 2),
        (None, True, 4),
        (smallest, False, 1),
    )
    for sizes, one_by_one, times in starts:
        if sizes is None:
            sizes = smallest.copy()
            sizes[best.rings.sequence] = best.rings.size
        budget = int(times * effort)
        found = _Outcome(*search(problem, alone, bound, pack, sizes, one_by_one, budget), True)
        best = found if found.end < best.end else best
    return best


@compiled
def _times(costs: Coefficients, lengths: Integers, node_size: int, pack: int) -> tuple[Integers, Integers]:
    """The least work of every sequence, and what it takes whole in a pack, without the micro-batch, ticks."""
    work, alone = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    for sequence in range(len(lengths)):
        length = lengths[sequence]
        if sequence and length == lengths[sequence - 1]:
            work[sequence], alone[sequence] = work[sequence - 1], alone[sequence - 1]
            continue
        recomputed = max(length, pack) > costs.keep_capacity
        work[sequence] = ticks(costs, least_work_s(costs, length, node_size))
        alone[sequence] = ticks(costs, shared_s(costs, length, 1, 1, False, False, recomputed))
    return work, alone


class _Stacked(NamedTuple):
    """Rings, slots and their filling for a target."""

    rings: Rings
    slots: Slots
    filling: Filling
    end: int
    fits: bool
    """Whether the rings end by the target at all; if not, the rest means nothing."""
    share: float
    """Of whole sequences in all work."""


@compiled
def _attempt(
    problem: Problem, work: Integers, alone: Integers, target: int, pack: int
) -> tuple[Rings, Slots, Filling, int, bool]:
    """Rings, slots and their filling for a target, when the last rank ends, and whether rings end by the target at all.

    Rings are stacked evenly, and where little else can level their ends also tightly; the better counts. Tightly is
    preferred if it is good enough: it leaves ranks without rings, who can take the place of one that is lost.
    """
    found = _stacked(problem, work, alone, target, False, pack)
    if not found.fits or found.share < _LEVELS_ALL:
        tight = _stacked(problem, work, alone, target, True, pack)
        if tight.fits and (not found.fits or tight.end <= max(found.end, int(target * _GOOD_ENOUGH))):
            found = tight
    return found.rings, found.slots, found.filling, found.end, found.fits


@compiled
def _stacked(problem: Problem, work: Integers, alone: Integers, target: int, tight: bool, pack: int) -> _Stacked:
    """As ``_attempt``, with rings stacked one way or the other."""
    costs, lengths = problem.costs, problem.lengths
    fixed = ticks(costs, costs.micro_batch_s)
    is_shared = (lengths > costs.capacity) | (alone + fixed > target)
    shared, whole = np.flatnonzero(is_shared), np.flatnonzero(~is_shared)
    rings, load, fits = place_rings(
        costs, lengths, shared, work, problem.slowness, problem.node_end, problem.node_size, target, tight
    )
    if not fits:
        none = load[:0]
        return _Stacked(rings, Slots(none, none, none), Filling(none, none), 0, False, 0.0)
    slots = slots_between(rings, load, target)
    filling = fill(slots, lengths, whole, alone, problem.slowness, pack, fixed)
    in_rings, in_packs = load.sum(), alone[whole].sum()
    goal = max(load.max(), (in_rings + in_packs) // len(load))
    budget = _LEVELLING + _LEVELLING_EACH * len(whole)
    end = level(filling, load, lengths, alone, problem.slowness, pack, fixed, goal, budget)
    return _Stacked(rings, slots, filling, end, True, in_packs / (in_rings + in_packs))
