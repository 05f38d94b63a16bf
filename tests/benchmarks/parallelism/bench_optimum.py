"""Plans of small instances against proven optima, and whose fault a gap is, the planner's or the bound's.

Instances are not chosen by how they turn out: 2 to 16 ranks and 4 to 8 sequences, whose lengths are drawn from a real corpus
(EVERMESH_LENGTHS names the folder; without it, from a log-normal), and costs as in ``tests/parallelism/planner/exact.py``.
The bound or the solver (CP-SAT, one core) decides whether any plan is more than half a percent faster than ours, which is
made with the effort that a step of two seconds gets. Sequences are as few as a solver decides within seconds: with up to 10
every sixth instance of a log-normal remained undecided, with up to 24 about half. EVERMESH_EXACT (260) instances, from
number EVERMESH_EXACT_FROM (0) on, with EVERMESH_EXACT_S (5) seconds of solver each; EVERMESH_EXACT_MOST (8) sequences.
EVERMESH_EXACT_FILE keeps what is known of each, a line of JSON, so that a run can be made in parts.

The split: a sequence that needs most of the ranks beside others, costs of LLaMA-7B, on 8 to 16 ranks, planned as large pools
are, without a search, and with it. EVERMESH_SPLIT (10) of each kind, with 10 seconds of solver each.
"""

import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evermesh.parallelism import CostModel, Layout, plan_batch
from tests.benchmarks.harness import Row, exact_row
from tests.benchmarks.parallelism.bench_planner import COST, geomean
from tests.benchmarks.parallelism.lengths import available_corpora, sample
from tests.parallelism.planner.exact import drawn_cost, giant_instance, is_possible, optimum, random_instance

EXACT, FIRST = int(os.environ.get("EVERMESH_EXACT", "260")), int(os.environ.get("EVERMESH_EXACT_FROM", "0"))
EXACT_S = float(os.environ.get("EVERMESH_EXACT_S", "5"))
MOST = int(os.environ.get("EVERMESH_EXACT_MOST", "8"))
RESULTS = os.environ.get("EVERMESH_EXACT_FILE")
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
    ranks: int
    sequences: int


def run() -> list[Row]:
    """How many plans are proven to be near the optimum, and the split of the gap."""
    plan_batch(*random_instance(0), effort=1.0)  # compiles
    judged = [_known(seed) or judge(seed) for seed in range(FIRST, FIRST + EXACT)]
    return _of_small(judged) + _split(8) + _split(16)


def real_instance(seed: int, most: int) -> tuple[list[int], Layout, CostModel]:
    """4 to ``most`` sequences of one corpus for 2 to 16 ranks, which all hold half to twice as many tokens at once."""
    draw = random.Random(seed)
    corpora = available_corpora()[2:]
    if not corpora:
        return random_instance(seed, most=most)
    hdp, lengths_of = draw.choice((2, 3, 4, 5, 6, 8, 12, 16)), sample(draw.choice(corpora))
    lengths = [int(lengths_of[draw.randrange(len(lengths_of))]) for _ in range(draw.randint(4, most))]
    capacity = max(-(-max(lengths) // hdp), int(sum(lengths) / hdp * draw.choice([0.5, 1.0, 2.0])))
    return lengths, Layout(hdp=hdp, capacity=capacity), drawn_cost(draw)


def judge(seed: int) -> Judged:
    """Our plan of an instance, searched for with full effort."""
    lengths, layout, cost = real_instance(seed, MOST)
    started = time.thread_time()
    certificate = plan_batch(lengths, layout, cost, effort=1.0).certificate
    planning_s = time.thread_time() - started
    near = certificate.ratio <= GOAL
    beaten = False if near else is_possible(lengths, layout, cost, certificate.makespan_s / GOAL, EXACT_S)
    judged = Judged(certificate.ratio, beaten, not near, planning_s, layout.hdp, len(lengths))
    if RESULTS:
        with Path(RESULTS).open("a") as file:
            file.write(json.dumps({"seed": seed, **judged._asdict()}) + "\n")
    return judged


def _known(seed: int) -> Judged | None:
    """What an earlier run wrote of an instance."""
    lines = Path(RESULTS).read_text().splitlines() if RESULTS and Path(RESULTS).exists() else []
    for line in map(json.loads, lines):
        if line.pop("seed") == seed:
            return Judged(**line)
    return None


def _of_small(judged: Sequence[Judged]) -> list[Row]:
    name = f"{len(judged)} small instances"
    open_ratios = [one.ratio for one in judged if one.beaten is None]
    planning_ms = sorted(1e3 * one.planning_s for one in judged)
    return [
        exact_row(
            f"{name}: proven within half a percent of the optimum",
            sum(one.beaten is False for one in judged),
            "",
            goal=200,
        ),
        exact_row(f"{name}: of these by the bound alone", sum(not one.by_solver for one in judged), ""),
        exact_row(f"{name}: a plan is faster by more than that", sum(one.beaten is True for one in judged), "", goal=0),
        exact_row(f"{name}: undecided after {EXACT_S:g} s", len(open_ratios), ""),
        exact_row(f"{name}: worst makespan/bound of those undecided", max(open_ratios, default=1.0), ""),
        *(
            exact_row(
                f"{name}: with {low} to {high} ranks: within half a percent",
                sum(one.beaten is False for one in judged if low <= one.ranks <= high),
                f"of {sum(low <= one.ranks <= high for one in judged)}",
            )
            for low, high in ((2, 4), (5, 8), (9, 16))
        ),
        exact_row(f"{name}: planning time, median", statistics.median(planning_ms), "ms"),
        exact_row(f"{name}: planning time, longest", planning_ms[-1], "ms", goal=50),
    ]


def _split(ranks: int) -> list[Row]:
    """Makespan over bound as the planner's part, makespan over the optimum, times the bound's, optimum over the bound."""
    large, searched, bounds, proven = [], [], [], 0
    for seed in range(SPLIT):
        lengths, layout = giant_instance(seed, ranks)
        as_large = plan_batch(lengths, layout, COST, effort=0.0).certificate
        ours = plan_batch(lengths, layout, COST, effort=1.0).certificate
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
