"""A new plan for a batch that is loaded already, when ranks are lost or slow: most sequences stay where they are."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from evermesh.parallelism.batch_plan import BatchPlan, Certificate
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner.assembling import Columns, Sharings, columns_of
from evermesh.parallelism.planner.batch import plan_batch
from evermesh.parallelism.planner.bound import bound_of, check_lengths
from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.costs import Coefficients, is_recomputed, shared_s, ticks
from evermesh.parallelism.planner.filling import level, slots_between
from evermesh.parallelism.planner.fractions import with_offload
from evermesh.parallelism.planner.hybrid import pack_sizes
from evermesh.parallelism.planner.making_room import make_room
from evermesh.parallelism.planner.mending import (
    Flags,
    Found,
    Packed,
    by_start,
    durations_of,
    found_in,
    keep,
    retime,
)
from evermesh.parallelism.planner.moved import moved_between
from evermesh.parallelism.planner.rings import Floats, Integers
from evermesh.parallelism.planner.sorting import longest_first
from evermesh.parallelism.planner.substitutes import substitute
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.rank_work import PackedRanks

_GOAL = 1.018
"""Of the new bound: ranks that end before need not give anything away."""
_GOOD_ENOUGH = 1.02
"""Of the new bound: a mended plan that takes longer is compared with a new one."""
_WORTH_MOVING = 1.01
"""A new plan, which moves most sequences, must be faster than the mended one by that factor."""
_SLOWER = 1.005
"""A rank that became slower than it was by that factor gives its places in rings away."""
_LEVELLING = 200_000
"""Comparisons to spend on exchanges between ranks; about a millisecond."""


@dataclass(frozen=True, slots=True)
class Replanned:
    """A plan for the ranks that are left, and what it moves.

    A sequence is moved when some rank needs tokens of it that it did not hold.
    """

    plan: BatchPlan
    layout: Layout
    """With the number of HDP ranks that are left."""
    pool: Pool
    """The ranks that are left, those behind a lost one moved up, at their new speeds."""
    anew: str | None
    """Why everything was planned anew; None: the plan was mended."""
    moved_sequences: int
    moved_tokens: int
    """Tokens that ranks need and did not hold."""

    @property
    def share_moved(self) -> float:
        """Of the sequences."""
        return self.moved_sequences / len(self.plan.lengths) if self.plan.lengths else 0.0


def replan_batch(
    plan: BatchPlan,
    layout: Layout,
    cost_model: CostModel,
    *,
    pool: Pool | None = None,
    lost: Collection[int] = frozenset(),
    speeds: Sequence[float] = (),
    speeds_version: int | None = None,
) -> Replanned:
    """Mend ``plan`` so that it does without the ``lost`` ranks, and takes the new ``speeds`` of the others into account.

    A pure function of its arguments, as ``plan_batch`` is. Plans of pipelines and of ranks that keep step, those of other
    planners that cannot be mended, and mended ones that end late are planned anew; ``Replanned.anew`` says why.

    Args:
        plan: of the batch.
        layout: that ``plan`` was made for.
        cost_model: that ``plan`` was made with.
        pool: that ``plan`` was made for; None: equal ranks on one node.
        lost: ranks that are no more.
        speeds: of all ranks of ``pool``; empty: as they were.
        speeds_version: version of the speeds, recorded in the plan; None: as it was.

    Raises:
        LayoutDoesNotFit: a lost rank does not exist, none is left, or the pool has another number of ranks.
        SequenceTooLong: a sequence exceeds the capacity of the ranks that are left.
    """
    pool = pool or Pool.of(layout.hdp)
    lost = frozenset(lost)
    _check(plan, layout, pool, lost)
    version = plan.speeds_version if speeds_version is None else speeds_version
    now = Pool.of(len(pool), speeds=speeds).speeds if speeds else pool.speeds
    left = Pool(pool.nodes, now).without(lost)
    of_left = layout.model_copy(update={"hdp": len(left)})
    lengths = np.asarray(plan.lengths, np.int64)
    check_lengths(lengths, of_left, len(left))
    if layout.runs_in_waves:
        mended, anew = None, "ranks in waves wait for each other in every wave"
    else:
        mended, anew = _mended(plan, of_left, cost_model, pool, now, left, lost), "its rings cannot be kept"
    if mended is None or mended.certificate.ratio > _GOOD_ENOUGH:
        fresh = plan_batch(plan.lengths, of_left, cost_model, pool=left)
        if mended is not None and mended.certificate.makespan_s > _WORTH_MOVING * fresh.certificate.makespan_s:
            ratios = f"{mended.certificate.ratio:.3f} of the bound, a new plan at {fresh.certificate.ratio:.3f}"
            mended, anew = None, f"mended it ends at {ratios}"
    chosen = fresh if mended is None else mended
    old_rank = np.array([rank for rank in range(len(pool)) if rank not in lost], np.int64)
    moved = moved_between(_packed(plan), _packed(chosen), old_rank)
    return Replanned(
        plan=replace(chosen, speeds_version=version),
        layout=of_left,
        pool=left,
        anew=anew if mended is None else None,
        moved_sequences=moved.sequences,
        moved_tokens=moved.tokens,
    )


def _check(plan: BatchPlan, layout: Layout, pool: Pool, lost: frozenset[int]) -> None:
    if not len(plan.ranks) == layout.hdp == len(pool):
        raise LayoutDoesNotFit(
            f"the plan is for {len(plan.ranks)} ranks, the pool has {len(pool)}, layout.hdp is {layout.hdp}. Give the layout "
            "and the pool that the plan was made for."
        )
    if unknown := sorted(rank for rank in lost if not 0 <= rank < len(pool)):
        raise LayoutDoesNotFit(f"the ranks {unknown} are lost, but there are only ranks 0 to {len(pool) - 1}.")
    if len(lost) == len(pool):
        raise LayoutDoesNotFit(f"all {len(pool)} ranks are lost; nobody is left to plan for.")


def _mended(
    plan: BatchPlan,
    layout: Layout,
    cost: CostModel,
    pool: Pool,
    now: Sequence[float],
    left: Pool,
    lost: frozenset[int],
) -> BatchPlan | None:
    """The mended plan, or None where it cannot be mended; ``layout`` is that of the ranks that are ``left``."""
    ranks = _packed(plan)
    lengths = ranks.lengths
    if not len(lengths):
        return replace(plan, ranks=PackedRanks.of([()] * len(left), ()))
    ordered = lengths[longest_first(lengths)]
    bound = bound_of(Coefficients.of(cost, layout, 1.0), ordered, np.asarray(left.speeds), left.largest_node)
    costs = Coefficients.of(cost, layout, bound.seconds * len(left))
    packed = Packed(*(getattr(ranks, column) for column in Packed._fields))
    nodes, was, slowness = np.asarray(pool.nodes, np.int64), 1.0 / np.asarray(pool.speeds), 1.0 / np.asarray(now)
    found = found_in(costs, lengths, packed, was, nodes)
    if found.end < 0:
        return None
    goal = max(ticks(costs, bound.seconds * _GOAL), found.end)
    is_lost = np.isin(np.arange(len(pool)), sorted(lost))
    heads, gathers = packed.heads.copy(), packed.gathers.copy()
    leaving = is_lost | (slowness > was * _SLOWER)
    if not substitute(found.rings, heads, leaving, is_lost, slowness, nodes, goal):
        return None
    found = by_start(found)
    durations = durations_of(costs, lengths, found.rings, heads, gathers, nodes)
    sharings = Sharings(_renumbered(found.rings.member, is_lost), heads, gathers, durations)
    rings = found.rings._replace(member=sharings.order)
    own = found._replace(rings=rings, holder=_renumbered(found.holder, is_lost))
    columns, makespan = _filled(costs, lengths, own, sharings, slowness[~is_lost], _pack_of(ranks, costs), goal)
    return replace(
        plan,
        ranks=with_offload(lengths, columns, layout, cost),
        certificate=Certificate(makespan / costs.ticks_per_s, bound.seconds, bound.binding),
        capacity=layout.capacity,
        cost_version=cost.version,
    )


def _packed(plan: BatchPlan) -> PackedRanks:
    return plan.ranks if isinstance(plan.ranks, PackedRanks) else PackedRanks.of(plan.ranks, plan.lengths)


def _renumbered(ranks: Integers, is_lost: Flags) -> Integers:
    """The numbers that ranks have when the lost ones are gone; -1: lost, or none."""
    number = np.where(is_lost, -1, np.cumsum(~is_lost) - 1)
    return np.where(ranks < 0, -1, number[ranks])


def _pack_of(ranks: PackedRanks, costs: Coefficients) -> int:
    """Tokens to which the whole sequences of a plan are packed: as many as need no recomputation, if none has more."""
    of_each = np.diff(ranks.micro_batch_start)
    tokens = np.add.reduceat(ranks.lengths[ranks.sequence], ranks.micro_batch_start[:-1][of_each > 0])
    most = int(tokens[of_each[of_each > 0] > 1].max(initial=0))
    return min(size for size in pack_sizes(costs) if size >= min(most, costs.capacity))


@compiled
def _filled(
    costs: Coefficients,
    lengths: Integers,
    found: Found,
    sharings: Sharings,
    slowness: Floats,
    pack: int,
    goal: int,
) -> tuple[Columns, int]:
    """The columns with whole sequences where they were, or where there is room, and when the last rank is done, ticks."""
    rings, fixed = found.rings, ticks(costs, costs.micro_batch_s)
    alone = np.empty(len(lengths), np.int64)
    for sequence in range(len(lengths)):
        again = is_recomputed(costs, max(lengths[sequence], pack))
        alone[sequence] = ticks(costs, shared_s(costs, lengths[sequence], 1, 1, False, False, again))
    load = retime(rings, sharings.durations, slowness)
    slots = slots_between(rings, load, goal)
    filling, room, loose = keep(
        slots, len(rings.first), lengths, found.holder, found.before, alone, slowness, pack, fixed
    )
    make_room(filling, slots, room, lengths, loose, alone, slowness, pack, fixed)
    level(filling, load, lengths, alone, slowness, pack, fixed, max(goal, load.max()), _LEVELLING)
    return columns_of(costs, lengths, alone, rings, sharings, slots, filling, slowness, pack)
