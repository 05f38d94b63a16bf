"""Proven optima of small instances with CP-SAT: every ring size and every schedule of one pool of equal ranks.

Sequences are tasks of a cumulative resource, the ranks: whole ones need one rank, rings as many as their size, chosen among
all sizes. Where a micro-batch has a fixed cost, whole sequences are packed into micro-batches by the solver too; a ring has
its own. Any schedule that respects the resource can be given ranks (interval graphs are perfect), so the optimum is that
of all plans.
"""

import random
from typing import NamedTuple

from ortools.sat.python import cp_model

from evermesh.parallelism import CostModel, Layout

_UNITS = 20_000
"""Of the horizon; costs are rounded down to whole units, so that what is proven is a lower bound."""


class Optimum(NamedTuple):
    """Seconds."""

    proven_s: float
    """No plan is faster."""
    found_s: float
    """The fastest plan found, some roundings early."""


def optimum(
    lengths: list[int], layout: Layout, cost: CostModel, horizon_s: float, limit_s: float, workers: int = 1
) -> Optimum:
    """Bound and best plan after at most ``limit_s``; ``horizon_s`` is the makespan of some plan."""
    unit = horizon_s / _UNITS
    model = cp_model.CpModel()
    ranks, end = layout.hdp, model.new_int_var(0, _UNITS + len(lengths), "end")
    intervals, demands = [], []
    area: list[cp_model.LinearExprT] = []
    packed: list[tuple[int, int, cp_model.IntVar]] = []
    for i, length in enumerate(lengths):
        choices = []
        for ring in range(-(-length // layout.capacity), ranks + 1):
            taken = model.new_bool_var(f"{i} on {ring}")
            choices.append(taken)
            if ring == 1 and cost.micro_batch_s:
                packed.append((i, int(cost.whole_s(length) / unit), taken))
                continue
            duration = int((cost.ring_s(length, ring) + cost.micro_batch_s) / unit)
            start = model.new_int_var(0, _UNITS, "")
            intervals.append(model.new_optional_fixed_size_interval_var(start, duration, taken, ""))
            demands.append(ring)
            area.append(ring * duration * taken)
            model.add(start + duration <= end).only_enforce_if(taken)
        model.add_exactly_one(choices)
    if packed:
        fixed = int(cost.micro_batch_s / unit)
        columns: dict[int, list[cp_model.IntVar]] = {i: [] for i, _, _ in packed}
        for j in range(len(packed)):
            used = model.new_bool_var("")
            inside = [model.new_bool_var("") for _ in packed]
            for (i, _, _), x in zip(packed, inside, strict=True):
                columns[i].append(x)
                model.add_implication(x, used)
            model.add(sum(lengths[i] * x for (i, _, _), x in zip(packed, inside, strict=True)) <= layout.capacity)
            start, size, stop = (model.new_int_var(0, _UNITS + len(lengths), "") for _ in range(3))
            model.add(size == sum(s * x for (_, s, _), x in zip(packed, inside, strict=True)) + fixed * used)
            intervals.append(model.new_interval_var(start, size, stop, ""))
            demands.append(1)
            area.append(size)
            model.add(stop <= end)
            # micro-batches are alike: number them by the first sequence in them
            for k, x in enumerate(inside):
                if k < j:
                    model.add(x == 0)
        for i, _, taken in packed:
            model.add(sum(columns[i]) == taken)
    model.add_cumulative(intervals, demands, ranks)
    model.add(sum(area) <= ranks * end)  # implied, and what proofs mostly rest on
    model.minimize(end)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = limit_s
    solver.parameters.num_workers = workers
    status = solver.solve(model)
    found = solver.objective_value * unit if status in (cp_model.OPTIMAL, cp_model.FEASIBLE) else float("inf")
    return Optimum(solver.best_objective_bound * unit, found)


def random_instance(seed: int) -> tuple[list[int], Layout, CostModel]:
    """At most 24 sequences for at most 16 ranks, with costs from none at all for rings to heavy ones."""
    draw = random.Random(seed)
    ranks, capacity = draw.choice([2, 3, 4, 5, 6, 8, 12, 16]), 8192
    count = draw.randint(4, 24)
    longest = capacity * ranks * draw.choice([0.3, 0.6, 0.9])
    lengths = [max(64, int(min(longest, draw.lognormvariate(8.3, draw.choice([0.8, 1.5]))))) for _ in range(count)]
    cost = CostModel(
        token_s=1e-5,
        pair_s=draw.choice([2e-10, 1e-9]),
        micro_batch_s=draw.choice([0.0, 0.0, 2e-3]),
        piece_s=draw.choice([0.0, 2e-4]),
        ring_step_s=draw.choice([0.0, 2e-4]),
        ring_token_s=draw.choice([0.0, 2e-6]),
    )
    return lengths, Layout(hdp=ranks, capacity=capacity), cost
