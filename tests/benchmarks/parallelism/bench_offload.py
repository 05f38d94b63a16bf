"""Planned steps with a fraction of offloaded tokens for each micro-batch, next to one fraction for all.

Coefficients are those of LLaMA-7B (GQA 8) on the nominal GPU (``runtime.cost``: 400 and 300 TFLOP/s, 50 GB/s to the host),
5 ms for each micro-batch; all times are planned, and those that the verifier replays. EVERMESH_LENGTHS names a folder with
real samples of lengths. EVERMESH_SEEDS (5) batches of each kind.
"""

import os
import statistics
import time
from typing import Any

from evermesh.parallelism import Layout, Pool, plan_batch, verify_plan
from evermesh.parallelism.cost import ModelShape
from evermesh.runtime.cost import cost_of_shape
from tests.benchmarks.harness import Row, exact_row
from tests.benchmarks.parallelism.lengths import available_corpora, large_batch

LLAMA_7B = ModelShape(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=11008, vocabulary=32_000)
SEEDS = int(os.environ.get("EVERMESH_SEEDS", "5"))
FIXED = (0.0, 0.5, 1.0)
KINDS = ((64, 65_536, 128 << 10, 8), (256, 65_536, 512 << 10, 8), (1024, 32_768, 2 << 20, 8))
"""Ranks, tokens of each, longest sequence, ranks of a node."""


def run() -> list[Row]:
    """Planned seconds of a step, and what planning takes."""
    rows: list[Row] = []
    for hdp, tokens, context, node in KINDS:
        for corpus in available_corpora():
            batches = [large_batch(corpus, seed, hdp * tokens, context) for seed in range(SEEDS)]
            name = f"{corpus}, {hdp} ranks, {tokens >> 10}K tokens each, context {context >> 10}K"
            found = {offload: _planned(batches, offload, hdp, node) for offload in (*FIXED, "auto")}
            step_s, ratio, planning_ms = found["auto"]
            for offload in FIXED:
                peer_s = found[offload][0]
                rows.append(exact_row(f"{name}: step", step_s, "s", peer=f"{offload} for all", peer_value=peer_s))
            rows.append(exact_row(f"{name}: makespan/bound", ratio, ""))
            peer_ms = found[1.0][2]
            rows.append(exact_row(f"{name}: planning time", planning_ms, "ms", peer="1.0 for all", peer_value=peer_ms))
    return rows


def _planned(batches: list[list[int]], offload: Any, hdp: int, node: int) -> tuple[float, float, float]:
    """Mean seconds of a step, mean ratio to the bound, and median milliseconds of planning."""
    layout, pool = Layout(hdp=hdp, capacity=8192, activations="offload", offload=offload), Pool.of(hdp, node)
    cost = cost_of_shape(LLAMA_7B, layout, None, 2).model_copy(update={"micro_batch_s": 5e-3})
    plan_batch(batches[0], layout, cost, pool=pool)  # compiles
    seconds, ratios, planning_ms = [], [], []
    for lengths in batches:
        started = time.thread_time()
        plan = plan_batch(lengths, layout, cost, pool=pool)
        planning_ms.append(1e3 * (time.thread_time() - started))
        verify_plan(plan, lengths, layout, cost=cost, pool=pool)
        seconds.append(plan.certificate.makespan_s)
        ratios.append(plan.certificate.ratio)
    return statistics.mean(seconds), statistics.mean(ratios), statistics.median(planning_ms)
