"""Plans of batches against what no plan can beat, and restated and released peers; all times are simulated.

Coefficients come from planner_cost.json: LLaMA-7B (GQA 8) with 8 H100 for each HDP rank, 400 and 300 TFLOP/s, 50 GB/s
between nodes, 5 ms for each micro-batch. Batches are drawn from the published tables of ByteScale's corpora and, where
EVERMESH_LENGTHS names a folder with them, from real samples. One core; planning times are of the planning thread, machine
code compiled. EVERMESH_SEEDS (20) batches of each kind; peers plan one batch of each kind.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evermesh.parallelism import CostModel, Layout, Pool, plan_batch
from evermesh.parallelism.batch_plan import BatchPlan, Certificate
from evermesh.parallelism.planner.restated import RESTATED
from evermesh.parallelism.simulator import Scenario, simulate_events
from tests.benchmarks.harness import Row, exact_row
from tests.benchmarks.parallelism.baselines import megatron_phases, megatron_scheduler, phases_s
from tests.benchmarks.parallelism.lengths import available_corpora, large_batch

COST = CostModel.model_validate(json.loads(Path(__file__).with_name("planner_cost.json").read_text()))
CAPACITY = 8192
SEEDS = int(os.environ.get("EVERMESH_SEEDS", "20"))
_MOST_RANKS_OF_PEERS = 256
"""Peers in Python are not asked for more."""


class Kind(NamedTuple):
    """Batches of one size."""

    hdp: int
    tokens_per_rank: int
    context: int
    node_size: int

    @property
    def name(self) -> str:
        """As rows say it."""
        return f"{self.hdp} ranks, {self.tokens_per_rank >> 10}K tokens each, context {self.context >> 10}K"


KINDS = (
    Kind(64, 65_536, 128 << 10, 8),
    Kind(256, 65_536, 512 << 10, 8),
    Kind(512, 65_536, 1 << 20, 1),
    Kind(1024, 32_768, 2 << 20, 8),
    Kind(1536, 43_690, 2 << 20, 1),
)
"""The longest sequence needs at most a quarter of the ranks."""
HARD = (Kind(64, 65_536, 512 << 10, 8), Kind(128, 32_768, 1 << 20, 8))
"""The longest sequence needs nearly all ranks."""


class Planned(NamedTuple):
    """What one batch gave."""

    ratio: float
    seconds: float
    plan: BatchPlan


def run() -> list[Row]:
    """Quality and time of large batches, and of peers."""
    rows: list[Row] = []
    for kinds, goal, label in ((KINDS, 1.03, "longest <= a quarter of the ranks"), (HARD, 1.10, "longest > a quarter")):
        ratios = []
        for kind in kinds:
            for corpus in available_corpora():
                found = [_planned(kind, corpus, seed) for seed in range(SEEDS)]
                ratios += [one.ratio for one in found]
                rows += _of_kind(f"{corpus}, {kind.name}", kind, found)
                if corpus == "byted":
                    rows += _peers(f"{corpus}, {kind.name}", kind, corpus, found[0])
        rows.append(exact_row(f"all: makespan/bound, geometric mean, {label}", geomean(ratios), "", goal=1.01))
        rows.append(exact_row(f"all: makespan/bound, worst, {label}", max(ratios), "", goal=goal))
    rows.append(exact_row("peak memory of a process that plans github, 1536 ranks", _peak_mib(), "MiB", goal=300))
    return rows


def _peak_mib() -> float:
    """Of a new process, with its imports and the machine code it loads."""
    program = (
        "from tests.benchmarks.parallelism import bench_planner as bench;"
        "bench._planned(bench.KINDS[-1], 'github', 1); print(open('/proc/self/status').read())"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # what getrusage tells is also of the process that this one was forked from
    return int(found.stdout.partition("VmHWM:")[2].split()[0]) / 1024


def _planned(kind: Kind, corpus: str, seed: int) -> Planned:
    lengths = large_batch(corpus, seed, kind.hdp * kind.tokens_per_rank, kind.context)
    layout, pool = Layout(hdp=kind.hdp, capacity=CAPACITY), Pool.of(kind.hdp, kind.node_size)
    if seed == 0:
        plan_batch(lengths, layout, COST, pool=pool)  # compiles
    started = time.thread_time()
    plan = plan_batch(lengths, layout, COST, pool=pool)
    return Planned(plan.certificate.ratio, time.thread_time() - started, plan)


def _of_kind(name: str, kind: Kind, found: Sequence[Planned]) -> list[Row]:
    ratios, times = [one.ratio for one in found], sorted(one.seconds for one in found)
    goal_s = {512: 15.0, 1536: 50.0}.get(kind.hdp)
    most = times[min(len(times) - 1, math.ceil(0.99 * len(times)) - 1)]
    wire = max(len(one.plan.to_json()) for one in found[:3]) / 2**20
    return [
        exact_row(f"{name}: makespan/bound, geometric mean", geomean(ratios), "", goal=1.01),
        exact_row(f"{name}: makespan/bound, worst", max(ratios), ""),
        exact_row(f"{name}: planning time, median", 1e3 * statistics.median(times), "ms"),
        exact_row(f"{name}: planning time, p99", 1e3 * most, "ms", goal=goal_s),
        exact_row(f"{name}: plan on the wire", wire, "MiB", goal=1.43),
    ]


def _peers(name: str, kind: Kind, corpus: str, ours: Planned) -> list[Row]:
    """The same batch as peers plan it, simulated with the same cost model."""
    if kind.hdp > _MOST_RANKS_OF_PEERS:
        return []
    lengths = large_batch(corpus, 0, kind.hdp * kind.tokens_per_rank, kind.context)
    layout, pool = Layout(hdp=kind.hdp, capacity=CAPACITY), Pool.of(kind.hdp, kind.node_size)
    bound_s, rows = ours.plan.certificate.lower_bound_s, []
    for peer, plan in RESTATED.items():
        started = time.thread_time()
        ranks = plan(lengths, layout, COST, pool)
        seconds = time.thread_time() - started
        made = BatchPlan(tuple(lengths), CAPACITY, ranks, Certificate(0.0, 0.0, "nothing"), peer, 0, 0)
        makespan_s = simulate_events(made, layout, COST, Scenario(pool)).timeline.makespan_s
        rows += _peer(name, f"{peer}, restated", ours, makespan_s / bound_s, seconds)
    scheduler = megatron_scheduler()
    if scheduler is not None:
        started = time.thread_time()
        phases = megatron_phases(scheduler, lengths, layout, pool)
        seconds = time.thread_time() - started
        rows += _peer(name, "Megatron Core, released", ours, phases_s(phases, lengths, COST, pool) / bound_s, seconds)
    else:
        print("Megatron Core is not installed: its rows are left out. pip install -e '.[bench]'")
    return rows


def _peer(name: str, peer: str, ours: Planned, ratio: float, seconds: float) -> list[Row]:
    return [
        exact_row(f"{name}: makespan/bound", ours.ratio, "", peer=peer, peer_value=ratio),
        exact_row(f"{name}: planning time", 1e3 * ours.seconds, "ms", peer=peer, peer_value=1e3 * seconds),
    ]


def geomean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))
