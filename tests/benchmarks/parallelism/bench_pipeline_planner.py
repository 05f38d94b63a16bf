"""Plans for pipelines against their bound, against the best sizes that micro-batches could have, and against other rules.

All times are simulated: 1F1B with 8 stages, the coefficients of a dense model of 70 billion parameters on HDP ranks of eight
accelerators (400 and 450 TFLOP/s sustained for products and attention, 200 GB/s between neighbours), 8 ms for every
micro-batch, a capacity of 8192 tokens and 32 x 8192 tokens per pipeline. Lengths are drawn from ByteScale's figure 4, as far
as it can be read; sequences above the context are left out. The peers are restatements.
"""

import itertools
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evermesh.parallelism import CostModel, Layout, plan_batch
from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.planner import lower_bound
from evermesh.parallelism.planner.pipelines import pipeline_bound, pipelines_s, plan_pipelines_s
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.rank_work import Assignment
from evermesh.parallelism.simulator import micro_batch_s
from tests.benchmarks.harness import Row, exact_row
from tests.benchmarks.parallelism.pipeline_peers import (
    Peer,
    arrival_order,
    best_sizes_s,
    descending,
    equal_counts,
    pipeline_balance,
)
from tests.parallelism.planner.aligned import align

SEEDS = int(os.environ.get("EVERMESH_BENCH_SEEDS", "20"))
PEER_SEEDS, PP, CAPACITY, MICRO_BATCHES = 3, 8, 8192, 32
DISTRIBUTIONS = {  # percent of tokens in buckets of lengths up to 2K, 4K, ..., 2M, and the shortest length
    "Byted": ((7.6, 7.6, 8.8, 10.2, 11.4, 10.4, 7.6, 7.6, 7.3, 9.7, 12.1), 256),
    "GitHub": ((34.0, 14.2, 10.7, 9.5, 7.6, 7.6, 6.4, 4.5, 2.9, 1.6, 0.8), 128),
}
CONTEXTS = {8: 32_768, 16: 65_536, 32: 131_072, 64: 131_072}
SHAPE = ModelShape(hidden=8192, layers=80, heads=64, kv_heads=8, head_dim=128, ffn=28_672, vocabulary=128_256)
COST = CostModel.from_model(
    SHAPE, flops_per_s=8 * 400e12, attention_flops_per_s=8 * 450e12, bytes_per_s=200e9
).model_copy(update={"micro_batch_s": 0.008})
PEERS: dict[str, Peer] = {
    "arrival order": arrival_order,
    "descending (verl, Megatron), restated": descending,
    "PP-balance (ByteScale), restated": pipeline_balance,
    "pull request 2959 (Megatron), restated": equal_counts,
    "plan for pp 1 in waves": lambda lengths, layout, cost: pipelines_s(
        align(
            tuple(plan_batch(lengths, Layout(hdp=layout.hdp, capacity=layout.capacity), cost).ranks),
            lengths,
            layout,
            cost,
        ),
        lengths,
        layout,
        cost,
        Pool.of(layout.hdp),
    ),
}


def run() -> list[Row]:
    """Ratios to the bound, planning times and peers."""
    rows: list[Row] = []
    ratios: list[float] = []
    for hdp, context in CONTEXTS.items():
        for name in DISTRIBUTIONS:
            found, more = _against_bound(name, hdp, context)
            ratios += found
            rows += more
            rows += _against_peers(name, hdp, context) if hdp <= 16 else []
    rows.insert(0, exact_row("simulated makespan/bound, geometric mean of all", _mean(ratios), "", goal=1.08))
    rows.append(_with_other_fixed_cost(0.02))
    rows += _limited_by_one_sequence()
    rows += _large()
    return rows


def _against_bound(name: str, hdp: int, context: int) -> tuple[list[float], list[Row]]:
    layout, pool = Layout(hdp=hdp, pp=PP, capacity=CAPACITY), Pool.of(hdp)
    ratios, own, best, times = [], [], [], []
    for seed in range(SEEDS):
        lengths = _batch(name, hdp, context, seed)
        started = time.thread_time()
        assignment, seconds = plan_pipelines_s(lengths, layout, COST, pool)
        times.append(time.thread_time() - started)
        bound = pipeline_bound(lengths, layout, COST, pool)
        ratios.append(seconds / bound.seconds)
        own.append(seconds / _own_bound_s(assignment, lengths))
        if seed < PEER_SEEDS and hdp <= 16:
            best.append(seconds / _best_sizes_s(lengths, layout))
    what = f"{name}, HDP {hdp}, up to {context // 1024}K tokens"
    rows = [
        exact_row(f"simulated makespan/bound, geometric mean, {what}", _mean(ratios), "", goal=1.08),
        exact_row(f"the same, worst, {what}", max(ratios), ""),
        exact_row(f"the same, to work, fill and drain of the plan's own micro-batches, {what}", _mean(own), ""),
        exact_row(f"planning time, median, {what}", statistics.median(times), "s"),
    ]
    if best:
        rows.append(exact_row(f"simulated makespan/best sizes by linear program, {what}", _mean(best), ""))
    return ratios, rows


def _own_bound_s(assignment: Assignment, lengths: Sequence[int]) -> float:
    """The work of a plan's own micro-batches, and the time to fill and drain a pipeline with its smallest one."""
    seconds = [[micro_batch_s(mb, lengths, COST) for mb in micro_batches] for micro_batches in assignment]
    smallest = min(itertools.chain.from_iterable(seconds))
    return (sum(map(sum, seconds)) / len(assignment) + (PP - 1) * smallest) / PP


def _best_sizes_s(lengths: Sequence[int], layout: Layout) -> float:
    """Of 40, 48, ... micro-batches among which the least work of a pipeline is divided without a rest or a limit."""
    fixed_s = math.ceil(sum(lengths) / CAPACITY) * COST.micro_batch_s / layout.hdp
    work_s = lower_bound(lengths, layout, COST).seconds - fixed_s
    return min(
        best_sizes_s(layout.pipeline, number, work_s, COST.micro_batch_s, work_s) for number in range(40, 129, 8)
    )


def _against_peers(name: str, hdp: int, context: int) -> list[Row]:
    layout = Layout(hdp=hdp, pp=PP, capacity=CAPACITY)
    batches = [_batch(name, hdp, context, seed) for seed in range(PEER_SEEDS)]
    bounds = [pipeline_bound(lengths, layout, COST, Pool.of(hdp)).seconds for lengths in batches]

    def ratio(seconds: Sequence[float]) -> float:
        return _mean([one / bound for one, bound in zip(seconds, bounds, strict=True)])

    ours = ratio([plan_pipelines_s(lengths, layout, COST, Pool.of(hdp)).seconds for lengths in batches])
    return [
        exact_row(
            f"simulated makespan/bound, {name}, HDP {hdp}",
            ours,
            "",
            peer=peer,
            peer_value=ratio([rule(lengths, layout, COST) for lengths in batches]),
        )
        for peer, rule in PEERS.items()
    ]


def _with_other_fixed_cost(fixed_s: float) -> Row:
    cost, layout = COST.model_copy(update={"micro_batch_s": fixed_s}), Layout(hdp=16, pp=PP, capacity=CAPACITY)
    ratios = [
        plan_pipelines_s(lengths, layout, cost, Pool.of(16)).seconds
        / pipeline_bound(lengths, layout, cost, Pool.of(16)).seconds
        for name in DISTRIBUTIONS
        for lengths in (_batch(name, 16, CONTEXTS[16], seed) for seed in range(PEER_SEEDS))
    ]
    what = f"simulated makespan/bound, HDP 16, {fixed_s * 1e3:.0f} ms per micro-batch instead of 8"
    return exact_row(what, _mean(ratios), "")


def _limited_by_one_sequence() -> list[Row]:
    """Contexts that all ranks together just hold; told apart by what limits them."""
    rows = []
    for hdp, context in ((16, 131_072), (64, 524_288)):
        layout = Layout(hdp=hdp, pp=PP, capacity=CAPACITY)
        for seed in range(PEER_SEEDS):
            lengths = _batch("Byted", hdp, context, seed)
            bound = pipeline_bound(lengths, layout, COST, Pool.of(hdp))
            seconds = plan_pipelines_s(lengths, layout, COST, Pool.of(hdp)).seconds
            what = f"Byted, HDP {hdp}, up to {context // 1024}K tokens, longest {max(lengths):,}, limited by {bound.binding}"
            rows.append(exact_row(f"simulated makespan/bound, {what}", seconds / bound.seconds, ""))
    return rows


def _large() -> list[Row]:
    rows = []
    for name in DISTRIBUTIONS:
        layout, lengths = Layout(hdp=192, pp=PP, capacity=CAPACITY), _batch(name, 192, 131_072, 0)
        started = time.thread_time()
        seconds = plan_pipelines_s(lengths, layout, COST, Pool.of(192)).seconds
        spent = time.thread_time() - started
        bound = pipeline_bound(lengths, layout, COST, Pool.of(192)).seconds
        what = f"{name}, HDP 192, {len(lengths):,} sequences"
        rows += [exact_row(f"planning time, {what}", spent, "s", goal=1.0)]
        rows += [replace(rows[-1], what=f"simulated makespan/bound, {what}", value=seconds / bound, unit="", goal=None)]
    return rows


def _batch(name: str, hdp: int, context: int, seed: int) -> tuple[int, ...]:
    """Lengths with 32 x 8192 tokens per pipeline: a bucket by its share of tokens, inside of it log-uniform."""
    shares, shortest = DISTRIBUTIONS[name]
    upper = np.array([2048 << index for index in range(len(shares)) if 2048 << index <= context])
    lower = np.concatenate(([shortest], upper[:-1]))
    per_sequence = np.array(shares[: len(upper)]) / ((upper - lower) / np.log(upper / lower))
    random = np.random.default_rng(seed)
    lengths: list[int] = []
    tokens, wanted = 0, MICRO_BATCHES * CAPACITY * hdp
    while tokens < wanted:
        bucket = random.choice(len(upper), p=per_sequence / per_sequence.sum())
        lengths.append(int(np.exp(random.uniform(np.log(lower[bucket]), np.log(upper[bucket])))))
        tokens += lengths[-1]
    return tuple(lengths)


def _mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)
