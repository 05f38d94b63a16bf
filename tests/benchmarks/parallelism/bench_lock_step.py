"""Plans of ranks that keep step, and of ranks that do not by Megatron Core and by peers restated, over their bounds.

The model has the shape of LLaMA 7B with 8 key and value heads; 400 and 450 TFLOP/s, 150 GB/s inside a node of 8, 25 GB/s
between nodes, 20 ms for a micro-batch. Everything is timed with this one model of costs.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from evermesh.parallelism import CostModel, Layout
from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.planner.lock_step import lock_step_bound, plan_lock_step
from evermesh.parallelism.planner.restated import RESTATED
from evermesh.parallelism.pool import Pool
from tests.benchmarks.harness import Row, exact_row
from tests.benchmarks.parallelism.baselines import megatron_phases, megatron_scheduler, phases_s
from tests.benchmarks.parallelism.lengths import byted, wikipedia
from tests.parallelism.planner.aligned import align
from tests.parallelism.planner.steps import lock_step_s

SHAPE = ModelShape(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=11008, vocabulary=32000)
COST = CostModel.from_model(
    SHAPE, flops_per_s=400e12, attention_flops_per_s=450e12, bytes_per_s=150e9, network_bytes_per_s=25e9
).model_copy(update={"micro_batch_s": 0.02})
ZERO_3 = {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ep 8": {"ep": 8},
    "ZeRO-3": {"sharding": ZERO_3},
    "ep 8, Ulysses": {"ep": 8, "ulysses": 8, "gathers_keys": True},
    "ZeRO-3, Ulysses": {"sharding": ZERO_3, "ulysses": 8, "gathers_keys": True},
}
SEEDS = 3


def run() -> list[Row]:
    """Means over batches of 64 ranks, and planning times with up to 512."""
    source, of_wikipedia = wikipedia(SEEDS, 2048, 384 * 1024)
    of_byted = [byted(seed, 4_000_000, 512 * 1024) for seed in range(SEEDS)]
    workloads = {source: of_wikipedia, "like Byted": of_byted}
    plan_lock_step((100,) * 64, Layout(hdp=64, ep=8), COST, Pool.of(64, 8))  # compiles
    rows = [row for name in LAYOUTS for work, batches in workloads.items() for row in _in_step(name, work, batches)]
    rows += [_planning_row(hdp, byted(0, 62_500 * hdp, 4096 * hdp)) for hdp in (256, 512)]
    return [*rows, *(row for work, batches in workloads.items() for row in _megatron_rows(work, batches))]


def _in_step(name: str, work: str, batches: Sequence[Sequence[int]]) -> list[Row]:
    layout, pool = Layout(hdp=64, capacity=8192, **LAYOUTS[name]), Pool.of(64, 8)
    ours, seconds = [], []
    peers: dict[str, list[float]] = {peer: [] for peer in RESTATED}
    for lengths in batches:
        bound = lock_step_bound(lengths, layout, COST, pool).seconds
        started = time.thread_time()
        plan = plan_lock_step(lengths, layout, COST, pool)
        seconds.append(time.thread_time() - started)
        ours.append(lock_step_s(plan, lengths, layout, COST, pool) / bound)
        for peer, restated in RESTATED.items():
            aligned = align(restated(lengths, layout, COST, pool), lengths, layout, COST)
            peers[peer].append(lock_step_s(aligned, lengths, layout, COST, pool) / bound)
    best = min(peers, key=lambda peer: statistics.mean(peers[peer]))
    what, peer_value = f"step over bound, {name}, {work}", statistics.mean(peers[best])
    return [
        exact_row(what, statistics.mean(ours), "", peer=f"best restated: {best}", peer_value=peer_value),
        exact_row(f"planning, {name}, {work}", statistics.median(seconds), "s"),
    ]


def _planning_row(hdp: int, lengths: Sequence[int]) -> Row:
    layout, pool = Layout(hdp=hdp, capacity=8192, ep=8, ulysses=8), Pool.of(hdp, 8)
    started = time.thread_time()
    plan_lock_step(lengths, layout, COST, pool)
    return exact_row(f"planning, ep 8, {hdp} ranks, like Byted", time.thread_time() - started, "s", goal=0.2)


def _megatron_rows(work: str, batches: Sequence[Sequence[int]]) -> list[Row]:
    """Its groups with a barrier each, on ranks that keep step for nothing else; ours with the barriers of ZeRO-3."""
    scheduler = megatron_scheduler()
    if scheduler is None:
        print("Megatron Core is not installed; see tests/benchmarks/parallelism/baselines.py. Its rows are left out.")
        return []
    layout, pool = Layout(hdp=64, capacity=8192, sharding=ZERO_3), Pool.of(64, 8)
    ours, theirs, our_s, their_s = [], [], [], []
    for lengths in batches:
        started = time.thread_time()
        plan = plan_lock_step(lengths, layout, COST, pool)
        planned = time.thread_time()
        phases = megatron_phases(scheduler, lengths, layout, pool)
        their_s.append(time.thread_time() - planned)
        our_s.append(planned - started)
        bound = lock_step_bound(lengths, layout, COST, pool).seconds
        ours.append(lock_step_s(plan, lengths, layout, COST, pool) / bound)
        theirs.append(phases_s(phases, lengths, COST, pool) / bound)
    peer = "Megatron Core, as released"
    mean, median = statistics.mean, statistics.median
    return [
        exact_row(f"step over bound, barriers, {work}", mean(ours), "", peer=peer, peer_value=mean(theirs)),
        exact_row(f"planning, barriers, {work}", median(our_s), "s", peer=peer, peer_value=median(their_s)),
    ]
