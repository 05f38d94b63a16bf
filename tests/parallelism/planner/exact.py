"""Proven optima of small instances with CP-SAT: every ring size and every schedule of one pool of equal ranks.

Sequences are tasks of a cumulative resource, the ranks: whole ones need one rank, rings as many as their size, chosen among
all sizes. Where a micro-batch has a fixed cost, whole sequences are packed into micro-batches by the solver too; a ring has
its own. Any schedule that respects the resource can be given ranks (interval graphs are perfect), so the optimum is that
of all plans. What makes proofs short: only plans up to a given makespan are asked for, which leaves every sequence the few
ring sizes that waste no more rank-seconds than such a plan has to spare.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from ortools.sat.python import cp_model

from evermesh.parallelism import CostModel, Layout

_UNITS = 200_000
"""Of the longest plan asked for; costs are rounded down to whole units, so that what is proven is a lower bound."""


class Optimum(NamedTuple):
    """Seconds."""

    proven_s: float
    """No plan is faster."""
    found_s: float
    """The fastest plan found, some roundings early; infinite: none that is as fast as was asked for."""


def optimum(
    lengths: list[int], layout: Layout, cost: CostModel, most_s: float, limit_s: float, workers: int = 1
) -> Optimum:
    """Bound and best plan, of those that take at most ``most_s``, after at most ``limit_s`` of solving."""
    unit = most_s / _UNITS
    model, end = _plans(lengths, layout, cost, unit)
    if model is None:
        return Optimum(most_s, float("inf"))
    model.minimize(end)
    solver, status = _solved(model, limit_s, workers)
    if status == cp_model.INFEASIBLE:
        return Optimum(most_s, float("inf"))
    found = solver.objective_value * unit if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else float("inf")
    return Optimum(solver.best_objective_bound * unit, found)


def is_possible(
    lengths: list[int], layout: Layout, cost: CostModel, most_s: float, limit_s: float, workers: int = 1
) -> bool | None:
    """Whether some plan takes at most ``most_s``, a few roundings aside; None: the solver did not say in time.

    False is a proof that every plan takes longer. Half of the time goes to a proof without an order in time.
    """
    shares = _shares(lengths, layout, cost, most_s / _UNITS)
    if shares is None or _solved(shares, limit_s / 2, workers)[1] == cp_model.INFEASIBLE:
        return False
    model, _ = _plans(lengths, layout, cost, most_s / _UNITS)
    assert model is not None, "both know the same ring sizes"
    status = _solved(model, limit_s / 2, workers)[1]
    return None if status == cp_model.UNKNOWN else status != cp_model.INFEASIBLE


def _solved(model: cp_model.CpModel, limit_s: float, workers: int) -> tuple[cp_model.CpSolver, cp_model.CpSolverStatus]:
    solver = cp_model.CpSolver()
    # of its own clock, which counts work, so that answers do not depend on who else computes
    solver.parameters.max_deterministic_time = limit_s
    solver.parameters.max_time_in_seconds = 10 * limit_s
    solver.parameters.num_workers = workers
    solver.parameters.use_overload_checker_in_cumulative = True
    return solver, solver.solve(model)


def _plans(
    lengths: list[int], layout: Layout, cost: CostModel, unit: float
) -> tuple[cp_model.CpModel | None, cp_model.IntVar]:
    """All plans that take at most ``_UNITS`` of ``unit`` seconds, and their end; None: there is none."""
    model, ranks = cp_model.CpModel(), layout.hdp
    end = model.new_int_var(0, _UNITS, "end")
    fixed = int(cost.micro_batch_s / unit)
    sizes = _ring_sizes(lengths, layout, cost, unit)
    if sizes is None:
        return None, end
    intervals, demands, packed = [], [], {}
    area: list[cp_model.LinearExprT] = []
    for i, durations in enumerate(sizes):
        choices = []
        for ring, duration in durations.items():
            taken = model.new_bool_var(f"{i} on {ring}")
            choices.append(taken)
            if ring == 1 and fixed:
                packed[i] = taken
                continue
            start = model.new_int_var(0, _UNITS - duration, "")
            intervals.append(model.new_optional_fixed_size_interval_var(start, duration, taken, ""))
            demands.append(ring)
            area.append(ring * duration * taken)
            model.add(start + duration <= end).only_enforce_if(taken)
        model.add_exactly_one(choices)
    for interval, size in _packs(
        model, end, packed, [durations.get(1, 0) for durations in sizes], lengths, layout, fixed
    ):
        intervals.append(interval)
        demands.append(1)
        area.append(size)
    model.add_cumulative(intervals, demands, ranks)
    model.add(sum(area) <= ranks * end)  # implied, and what proofs mostly rest on
    return model, end


def _shares(lengths: list[int], layout: Layout, cost: CostModel, unit: float) -> cp_model.CpModel | None:
    """All ways to give ranks to sequences so that nobody has more than ``_UNITS`` of work, whenever it runs; None: none.

    As many micro-batches as the tokens of the whole sequences of a rank fill. Every plan is one of these ways, and they know
    neither time nor the order of a rank, so that a proof need not look at all orders.
    """
    sizes = _ring_sizes(lengths, layout, cost, unit)
    if sizes is None:
        return None
    model, ranks, fixed = cp_model.CpModel(), range(layout.hdp), int(cost.micro_batch_s / unit)
    work: list[list[cp_model.LinearExprT]] = [[] for _ in ranks]
    tokens: list[list[cp_model.LinearExprT]] = [[] for _ in ranks]
    longest = lengths.index(max(lengths))
    for i, durations in enumerate(sizes):
        choices = []
        for ring, duration in durations.items():
            taken = model.new_bool_var("")
            choices.append(taken)
            # ranks are alike: the longest sequence is on the first
            fixed_place = i == longest or ring == layout.hdp
            members = [
                (taken if rank < ring else 0) if fixed_place else model.new_bool_var(f"{i} of {ring} on {rank}")
                for rank in ranks
            ]
            if not fixed_place:
                model.add(sum(members) == ring * taken)
            for rank in ranks:
                work[rank].append(duration * members[rank])
                if ring == 1 and fixed:
                    tokens[rank].append(lengths[i] * members[rank])
        model.add_exactly_one(choices)
    for rank in ranks:
        packs = model.new_int_var(0, len(lengths), "")
        model.add(packs * layout.capacity >= sum(tokens[rank]))
        model.add(cp_model.LinearExpr.sum(work[rank]) + fixed * packs <= _UNITS)
    return model


def _ring_sizes(lengths: list[int], layout: Layout, cost: CostModel, unit: float) -> list[dict[int, int]] | None:
    """The ring sizes that every sequence may have in a plan of ``_UNITS``, and how long it takes; None: one has none.

    A size is left out where a smaller one is as fast, and where it wastes more than all ranks have to spare if all others
    waste nothing. A whole sequence is without its micro-batch, of whose fixed time it bears at least its share of tokens.
    """
    ranks, fixed_s = layout.hdp, cost.micro_batch_s
    durations: list[dict[int, int]] = []
    areas: list[dict[int, int]] = []
    for length in lengths:
        own: dict[int, int] = {}
        area: dict[int, int] = {}
        fastest = _UNITS + 1
        for ring in range(-(-length // layout.capacity), ranks + 1):
            whole = ring == 1 and fixed_s > 0
            duration = int((cost.whole_s(length) if ring == 1 else cost.ring_s(length, ring)) / unit)
            with_fixed = duration + int(fixed_s / unit)
            if with_fixed >= fastest:
                continue
            fastest = with_fixed
            own[ring] = duration if whole else with_fixed
            share = int(fixed_s / unit * length / layout.capacity) if whole else 0
            area[ring] = ring * own[ring] + share
        if not own:
            return None
        durations.append(own)
        areas.append(area)
    spare = ranks * _UNITS - sum(min(area.values()) for area in areas)
    if spare < 0:
        return None
    return [
        {ring: duration for ring, duration in own.items() if area[ring] - min(area.values()) <= spare}
        for own, area in zip(durations, areas, strict=True)
    ]


def _packs(
    model: cp_model.CpModel,
    end: cp_model.IntVar,
    packed: dict[int, cp_model.IntVar],
    whole: list[int],
    lengths: list[int],
    layout: Layout,
    fixed: int,
) -> list[tuple[cp_model.IntervalVar, cp_model.IntVar]]:
    """Micro-batches for the sequences that are taken whole, one for each that may be the first of its own."""
    inside = {(i, j): model.new_bool_var(f"{i} in {j}") for j in packed for i in packed if i >= j}
    for i, taken in packed.items():
        model.add(sum(inside[i, j] for j in packed if j <= i) == taken)
    packs = []
    for j in packed:
        own = [i for i in packed if i >= j]
        used = inside[j, j]
        for i in own[1:]:
            model.add_implication(inside[i, j], used)
        model.add(sum(lengths[i] * inside[i, j] for i in own) <= layout.capacity)
        start, size, stop = (model.new_int_var(0, _UNITS, "") for _ in range(3))
        model.add(size == sum(whole[i] * inside[i, j] for i in own) + fixed * used)
        model.add(stop <= end)
        packs.append((model.new_optional_interval_var(start, size, stop, used, ""), size))
    return packs


def random_instance(
    seed: int, ranks: Sequence[int] = (2, 3, 4, 5, 6, 8, 12, 16), most: int = 24
) -> tuple[list[int], Layout, CostModel]:
    """4 to ``most`` sequences for so many ranks, with costs from none at all for rings to heavy ones."""
    draw = random.Random(seed)
    hdp, capacity = draw.choice(ranks), 8192
    count = draw.randint(4, most)
    longest = capacity * hdp * draw.choice([0.3, 0.6, 0.9])
    lengths = [max(64, int(min(longest, draw.lognormvariate(8.3, draw.choice([0.8, 1.5]))))) for _ in range(count)]
    return lengths, Layout(hdp=hdp, capacity=capacity), drawn_cost(draw)


def drawn_cost(draw: random.Random) -> CostModel:
    """Costs of an instance: of rings and micro-batches none at all, or heavy ones."""
    return CostModel(
        token_s=1e-5,
        pair_s=draw.choice([2e-10, 1e-9]),
        micro_batch_s=draw.choice([0.0, 0.0, 2e-3]),
        piece_s=draw.choice([0.0, 2e-4]),
        ring_step_s=draw.choice([0.0, 2e-4]),
        ring_token_s=draw.choice([0.0, 2e-6]),
    )


def giant_instance(seed: int, ranks: int) -> tuple[list[int], Layout]:
    """One sequence that needs at least half of the ranks, and others, as many tokens again."""
    draw = random.Random(seed)
    capacity = 8192
    giant = int(capacity * ranks * draw.uniform(0.5, 0.98))
    lengths, left = [giant], int(capacity * ranks * draw.uniform(0.6, 1.4))
    while left > 0:
        lengths.append(min(left, max(1024, min(giant, int(draw.lognormvariate(9.2, 0.9))))))
        left -= lengths[-1]
    return lengths, Layout(hdp=ranks, capacity=capacity)
