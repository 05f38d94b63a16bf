"""Plans of small instances against proven optima, and whose fault a gap is, the planner's or the bound's.

Instances have 2 to 16 ranks and 4 to 10 sequences (``tests/parallelism/planner/exact.py``), few enough for a solver, and are
not chosen by how they turn out. For each, the bound or the solver (CP-SAT, one core) decides whether any plan is more than
half a percent faster than ours. EVERMESH_EXACT (200) instances with EVERMESH_EXACT_S (5) seconds of solver each at most;
EVERMESH_EXACT_MOST (10) sequences: with 24, about half of the instances remain undecided.

The split: a sequence that needs most of the ranks beside others, costs of LLaMA-7B, on 8 to 16 ranks, planned as large pools
are, without a search, and with it. EVERMESH_SPLIT (10) of each kind, with 10 seconds of solver each.
"""

import os
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

from evermesh.parallelism import plan_batch
from tests.benchmarks.harness import Row, exact_row
from tests.benchmarks.parallelism.bench_planner import COST, geomean
from tests.parallelism.planner.exact import giant_instance, is_possible, optimum, random_instance

EXACT = int(os.environ.get("EVERMESH_EXACT", "200"))
EXACT_S = float(os.environ.get("EVERMESH_EXACT_S", "5"))
MOST = int(os.environ.get("EVERMESH_EXACT_MOST", "10"))
SPLIT = int(os.environ.get("EVERMESH_SPLIT", "10"))
GOAL = 1.005
"""Makespan over the optimum."""
_SPLIT_S = 10.0
"""Of solver, for each instance of the split."""


class Judged(NamedTuple):
    """One small instance."""

    ratio: float
    """Makespan over our bound."""
    beaten: bool | None
    """Whether some plan is faster by more than the goal; None: nobody knows."""
    by_solver: bool
    """Whether it took a solver to say so."""
    planning_s: float


def run() -> list[Row]:
    """How many plans are proven to be near the optimum, and the split of the gap."""
    plan_batch(*random_instance(0))  # compiles
    judged = [judge(seed) for seed in range(EXACT)]
    return _of_small(judged) + _split(8) + _split(16)


def judge(seed: int) -> Judged:
    """Our plan of an instance, with the usual effort."""
    lengths, layout, cost = random_instance(seed, most=MOST)
    started = time.thread_time()
    certificate = plan_batch(lengths, layout, cost).certificate
    planning_s = time.thread_time() - started
    if certificate.ratio <= GOAL:
        return Judged(certificate.ratio, False, False, planning_s)
    beaten = is_possible(lengths, layout, cost, certificate.makespan_s / GOAL, EXACT_S)
    return Judged(certificate.ratio, beaten, True, planning_s)


def _of_small(judged: Sequence[Judged]) -> list[Row]:
    count, name = len(judged), f"{len(judged)} small instances"
    open_ratios = [one.ratio for one in judged if one.beaten is None]
    planning_ms = sorted(1e3 * one.planning_s for one in judged)
    return [
        exact_row(
            f"{name}: proven within half a percent of the optimum",
            sum(one.beaten is False for one in judged),
            "",
            goal=count,
        ),
        exact_row(f"{name}: of these by the bound alone", sum(not one.by_solver for one in judged), ""),
        exact_row(f"{name}: a plan is faster by more than that", sum(one.beaten is True for one in judged), "", goal=0),
        exact_row(f"{name}: undecided after {EXACT_S:g} s", len(open_ratios), ""),
        exact_row(f"{name}: worst makespan/bound of those undecided", max(open_ratios, default=1.0), ""),
        exact_row(f"{name}: planning time, median", statistics.median(planning_ms), "ms"),
        exact_row(f"{name}: planning time, longest", planning_ms[-1], "ms", goal=50),
    ]


def _split(ranks: int) -> list[Row]:
    """Makespan over bound as the planner's part, makespan over the optimum, times the bound's, optimum over the bound."""
    large, searched, bounds, proven = [], [], [], 0
    for seed in range(SPLIT):
        lengths, layout = giant_instance(seed, ranks)
        as_large = plan_batch(lengths, layout, COST, effort=0.0).certificate
        ours = plan_batch(lengths, layout, COST).certificate
        best = optimum(lengths, layout, COST, ours.makespan_s, _SPLIT_S)
        proven += best.found_s <= 1.001 * best.proven_s
        found_s = min(best.found_s, ours.makespan_s)
        large.append(as_large.makespan_s / found_s)
        searched.append(ours.makespan_s / found_s)
        bounds.append(found_s / ours.lower_bound_s)
    name = f"{SPLIT} batches with a giant, {ranks} ranks"
    return [
        exact_row(f"{name}: optimum known to a thousandth", proven, ""),
        exact_row(f"{name}: best known plan / bound, geometric mean", geomean(bounds), ""),
        exact_row(f"{name}: best known plan / bound, worst", max(bounds), ""),
        exact_row(f"{name}: ours as for large pools / best known, geometric mean", geomean(large), ""),
        exact_row(f"{name}: ours as for large pools / best known, worst", max(large), ""),
        exact_row(f"{name}: ours / best known, geometric mean", geomean(searched), ""),
        exact_row(f"{name}: ours / best known, worst", max(searched), ""),
    ]
