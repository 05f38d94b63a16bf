"""Plans for pipelines: number, contents and order of the micro-batches of every pipeline, chosen together.

All pipelines run the same waves, small to large to small, each with micro-batches of about one size: so rings, which lie in
one wave, and ranks that share experts, which run all waves together, wait for nobody.

1. For some sizes of a full wave: every sequence gets the smallest ring that stays within it, which says how many waves are
   needed; ``profile`` chooses how they rise and fall.
2. The profiles that promise most are filled with the sequences (``fill``), their waves put in the best order that
   moving one at a time finds, and all pipelines replayed with their real schedule (``replay``).
3. The one that ends first is the plan.

Everything is decided on integers, ties break by index: the plan is a pure function of its arguments.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from evermesh.parallelism.batch_plan import MicroBatch, Piece
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.pipeline.simulator import run_together
from evermesh.parallelism.planner.costs import Coefficients, shared_s, ticks
from evermesh.parallelism.planner.fractions import with_fractions
from evermesh.parallelism.planner.pipelines.fill import fill
from evermesh.parallelism.planner.pipelines.order import arrange, better_order, replayed
from evermesh.parallelism.planner.pipelines.problem import (
    Integers,
    Placement,
    Problem,
    Waves,
    check_batch,
    problem_of,
)
from evermesh.parallelism.planner.pipelines.profile import (
    Demand,
    Shape,
    pack_estimate,
    profile_of,
    search,
    stage_ticks,
)
from evermesh.parallelism.planner.pipelines.regroup import regroup
from evermesh.parallelism.planner.pipelines.replay import Gangs, count_members, join, no_gangs
from evermesh.parallelism.planner.pipelines.rings import choose_rings
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.rank_work import Assignment
from evermesh.parallelism.simulator import micro_batch_s

_TARGETS = (2000, 1500, 1250, 1100, 1000, 925, 850, 775, 700, 625, 550, 400, 300, 200)
"""Sizes of a full wave to try, in thousandths of the time of a micro-batch of whole sequences that is full of tokens."""
_SEARCHED = 6
"""Sizes of which the best shape is searched: those that promise most with a usual one."""
_SWEEPS = 3
"""Rounds of a search for the best shape."""
_FILLED = 3
"""Sizes and shapes that are filled."""
_USUAL_SLACK, _SLACKS = 1010, (1000, 1020, 1035)
"""Thousandths of the time that sequences take, for which waves are made: they never fill them quite evenly."""


class Planned(NamedTuple):
    """The micro-batches of every HDP rank, and when the last of them is done."""

    assignment: Assignment
    seconds: float


class _Candidate(NamedTuple):
    """A filled profile."""

    ticks: int
    """When the last pipeline is done."""
    waves: Waves
    """In the order in which they were filled."""
    wave_at: Integers
    """[HDP rank, micro-batch]: the wave that it is."""
    counts: Integers
    """[HDP rank]: micro-batches."""
    placement: Placement


def plan_pipelines(lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool) -> Assignment:
    """The micro-batches of every HDP rank of ``pool``, in the order in which its pipeline runs them.

    A ring has one index on all its members. HDP ranks that keep step have equally many micro-batches, numbered, some of
    them without tokens.

    Raises:
        SequenceTooLong: a sequence exceeds the capacity of all ranks together.
        LayoutDoesNotFit: a length is not positive, or the pool has another number of ranks.
    """
    return plan_pipelines_s(lengths, layout, cost, pool).assignment


def plan_pipelines_s(
    lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool, effort: float = 1.0
) -> Planned:
    """``plan_pipelines``, and when the last pipeline is done; raises as that does.

    With less ``effort`` than 1 shapes are searched in fewer rounds, but in one: the usual shape may take twice as long.
    """
    check_batch(lengths, layout, pool)
    if not lengths:
        return Planned(((),) * layout.hdp, 0.0)
    problem = problem_of(lengths, layout, cost, pool)
    filled = [
        (_filled(problem, wanted, shape, _USUAL_SLACK), wanted, shape)
        for wanted, shape in _shapes(problem, layout, max(1, round(min(1.0, effort) * _SWEEPS)))
    ]
    best, wanted, shape = min(filled, key=lambda candidate: candidate[0].ticks)
    others = (_filled(problem, wanted, shape, slack) for slack in _SLACKS)
    best = min(best, *others, key=lambda candidate: candidate.ticks)
    assignment = with_fractions(_assignment(best, problem, layout, lengths), lengths, layout, cost)
    if problem.costs.offloads:  # waves were filled as if every document hid its copies alone
        return Planned(assignment, pipelines_s(assignment, lengths, layout, cost, pool))
    return Planned(assignment, best.ticks / problem.costs.ticks_per_s)


def pipelines_s(
    assignment: Sequence[Sequence[MicroBatch]], lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool
) -> float:
    """When the last pipeline of any assignment is done, seconds: a fast ``replay_waves`` that knows nodes and speeds.

    Raises:
        PlanInvalid: the ranks wait for each other in a circle.
    """
    most = max(map(len, assignment), default=0)
    if most == 0:
        return 0.0
    num_ranks = len(assignment)
    seconds = np.zeros((num_ranks, most))
    recomputed = np.zeros((num_ranks, most), dtype=np.bool_)
    for rank, micro_batches in enumerate(assignment):
        for index, micro_batch in enumerate(micro_batches):
            seconds[rank, index] = micro_batch_s(micro_batch, lengths, cost, pool) / pool.speeds[rank]
            recomputed[rank, index] = micro_batch.recompute == "block"
    ticks_per_s = Coefficients.of(cost, layout, float(seconds.sum())).ticks_per_s
    gangs = no_gangs(most, num_ranks)
    root, following = gangs.root.copy(), gangs.following.copy()
    for (rank, index), members in run_together(assignment, layout).items():
        join(root[index], following[index], rank, members[0])
    parts = stage_ticks(
        (seconds * ticks_per_s).astype(np.int64).ravel(), recomputed.ravel(), layout.pipeline.num_stages
    )
    counts = np.array([len(micro_batches) for micro_batches in assignment], dtype=np.int64)
    total = replayed(
        layout.pipeline, counts, parts.reshape(num_ranks, most, 4), Gangs(root, count_members(root), following)
    )
    return total / ticks_per_s


def _shapes(problem: Problem, layout: Layout, sweeps: int) -> list[tuple[Demand, Shape]]:
    """The most promising ones, each of another size of full waves, searched in so many rounds."""
    found = []
    for recomputed in (False, True):
        room = layout.capacity if recomputed or layout.recompute == "none" else problem.costs.keep_capacity
        if room == 0 or (recomputed and layout.recompute == "none"):
            continue
        room_ticks = _room_ticks(problem, room, recomputed)
        for share in _TARGETS:
            wanted = _demand(problem, room, recomputed, room_ticks, max(1, room_ticks * share // 1000))
            if wanted is not None:
                found.append((profile_of(wanted, Shape(), problem.machine).estimate, wanted))
    found.sort(key=lambda pair: pair[0])
    searched = [(*search(wanted, problem.machine, sweeps), wanted) for _, wanted in found[:_SEARCHED]]
    searched.sort(key=lambda triple: triple[1])
    return [(wanted, shape) for shape, _, wanted in searched[:_FILLED]]


def _room_ticks(problem: Problem, room: int, recomputed: bool) -> int:
    """What a micro-batch takes that is full of the whole sequences of the batch."""
    lengths, whole = problem.batch.lengths, problem.batch.whole[int(recomputed)]
    short = lengths <= room
    if not short.any():
        return ticks(problem.costs, shared_s(problem.costs, room, 1, 1, False, False, recomputed))
    return int(whole[short].sum()) * room // int(lengths[short].sum())


def _demand(problem: Problem, room: int, recomputed: bool, room_ticks: int, target: int) -> Demand | None:
    """None: some sequence has no room."""
    rings, needed = choose_rings(problem.costs, problem.ranks, problem.batch, room, recomputed, target)
    if (rings == 0).any():
        return None
    tall = needed > target
    heights, free = _shelves(rings[tall], needed[tall], problem.ranks.nodes.size)
    tokens = int(problem.batch.lengths.sum()) // problem.ranks.nodes.size
    area = int((rings * needed)[~tall].sum())
    area -= int((free * np.minimum(heights, room_ticks)).sum())
    return Demand(target, room, recomputed, max(0, area), room_ticks, tokens, tuple(heights.tolist()))


def _shelves(rings: Integers, needed: Integers, num_ranks: int) -> tuple[Integers, Integers]:
    """Rings side by side in waves, highest first, each in the first wave with ranks left; heights and free ranks."""
    heights: list[int] = []
    free: list[int] = []
    for index in np.argsort(-needed, kind="stable").tolist():
        size = int(rings[index])
        shelf = next((i for i, left in enumerate(free) if left >= size), None)
        if shelf is None:
            heights.append(int(needed[index]))
            free.append(num_ranks - size)
        else:
            free[shelf] -= size
    return np.array(heights, dtype=np.int64), np.array(free, dtype=np.int64)


def _filled(problem: Problem, wanted: Demand, shape: Shape, slack: int) -> _Candidate:
    """Waves of that shape with the sequences in them, in a good order."""
    waves = profile_of(wanted, shape, problem.machine, slack).waves
    while True:
        positions = np.argsort(-waves.targets, kind="stable")
        largest_first = Waves(waves.targets[positions], waves.room[positions], waves.recomputed[positions])
        placement = _nowhere(problem.batch.lengths.size)
        lost, loads = fill(problem.costs, problem.ranks, problem.batch, largest_first, wanted.target, placement)
        if lost == 0:
            break
        waves = _with_more(waves, wanted, lost, problem)
    loads = regroup(problem.ranks, largest_first, placement, loads)
    return _replay_filled(problem, largest_first, positions, placement, loads)


def _nowhere(count: int) -> Placement:
    def numbers() -> Integers:
        return np.zeros(count, dtype=np.int64)

    return Placement(numbers(), numbers(), numbers(), numbers(), np.zeros(count, dtype=np.bool_))


def _with_more(waves: Waves, wanted: Demand, lost: int, problem: Problem) -> Waves:
    """More full waves, in the middle, for ``lost`` sequences that found no room."""
    number = 1 + lost // (4 * problem.ranks.nodes.size)
    middle = int(np.argmax(waves.targets))
    targets = np.insert(waves.targets, middle, [wanted.target] * number)
    room = np.insert(waves.room, middle, [wanted.room] * number)
    return Waves(targets, room, np.insert(waves.recomputed, middle, [wanted.recomputed] * number))


def _replay_filled(
    problem: Problem, waves: Waves, positions: Integers, placement: Placement, loads: Integers
) -> _Candidate:
    """``positions`` are those of the waves in the profile, largest first."""
    machine, speeds = problem.machine, problem.ranks.speeds
    largest = (loads / speeds).max(axis=1).astype(np.int64) + machine.fixed
    parts = stage_ticks(largest, waves.recomputed, machine.schedule.num_stages)
    # waves came out a little larger or smaller than was meant; unlike neighbours would wait for each other
    sequence = np.empty_like(positions)
    sequence[positions] = np.argsort(-largest, kind="stable")
    sequence = better_order(pack_estimate(machine.schedule, sequence.size), parts, sequence)
    position = np.argsort(sequence)
    wave_at, counts, root, following = arrange(placement, loads > 0, position, problem.groups)
    ticks_at = ((loads.T[np.arange(len(counts))[:, None], wave_at] + machine.fixed) / speeds[:, None]).astype(np.int64)
    parts = stage_ticks(ticks_at.ravel(), waves.recomputed[wave_at].ravel(), machine.schedule.num_stages)
    gangs = Gangs(root, count_members(root), following)
    total = replayed(machine.schedule, counts, parts.reshape(*ticks_at.shape, 4), gangs)
    return _Candidate(total, waves, wave_at, counts, placement)


def _assignment(found: _Candidate, problem: Problem, layout: Layout, lengths: Sequence[int]) -> Assignment:
    pieces: dict[tuple[int, int], list[Piece]] = {}
    placed = zip(problem.order.tolist(), *(field.tolist() for field in found.placement), strict=True)
    for sequence, wave, first, size, heads, gathers in placed:
        ring = tuple(range(first, first + size))
        for rank, piece in zip(ring, _pieces(sequence, lengths[sequence], ring, heads, gathers), strict=True):
            pieces.setdefault((rank, wave), []).append(piece)
    kept = found.waves.recomputed.tolist()
    return tuple(
        tuple(
            MicroBatch(
                tuple(pieces.get((rank, wave), ())),
                recompute="block" if kept[wave] else "none",
                lock_step=index if problem.groups[rank] >= 0 else None,
            )
            for index, wave in enumerate(found.wave_at[rank, : found.counts[rank]].tolist())
        )
        for rank in range(layout.hdp)
    )


def _pieces(sequence: int, length: int, ring: tuple[int, ...], heads: int, gathers: bool) -> Iterator[Piece]:
    """One for every member, in the order of the ring."""
    if len(ring) == 1:
        yield Piece(sequence, ((0, length),), ring)
        return
    for index in range(len(ring)):
        yield Piece(sequence, share_of(length, len(ring), index).ranges(), ring, heads, gathers)


__all__ = ["Planned", "pipelines_s", "plan_pipelines", "plan_pipelines_s"]
