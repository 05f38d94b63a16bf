"""Planning time and makespan over bound, against giving every sequence all ranks and against whole sequences by LPT.

Lengths are those of the standard library's source, as the demo draws them, and a made-up long-tailed batch for more
ranks. The peers are our restatements; all are simulated with one cost model.
"""

import statistics
import time

import numpy as np

from evermesh.parallelism import CostModel, Layout, plan_batch, verify_plan
from evermesh.parallelism.planner import lower_bound
from evermesh.runtime.cost import nominal_cost
from evermesh.runtime.data import Sampler, open_sources
from tests.benchmarks.harness import Row, exact_row
from tests.benchmarks.runtime.bench_planned_step import CONFIG

BATCHES = 30


def run() -> list[Row]:
    """Quality and time on the demo's batches and on larger pools of ranks."""
    corpora = open_sources(CONFIG.data)
    sampler = Sampler(corpora, CONFIG.data, seed=1)
    cost = nominal_cost(CONFIG, CONFIG.model.shape(corpora[0].vocabulary))
    rows = _compare("stdlib, 4 ranks", [sampler.next_batch().lengths for _ in range(BATCHES)], CONFIG.layout, cost)
    random = np.random.default_rng(0)
    for hdp, batches in ((64, 3), (256, 2)):
        lengths = [_long_tailed(random, 16_384 * hdp, 262_144) for _ in range(batches)]
        rows += _compare(f"log-normal, {hdp} ranks", lengths, Layout(hdp=hdp, capacity=8192), cost)
    return rows


def _compare(name: str, batches: list[tuple[int, ...]], layout: Layout, cost: CostModel) -> list[Row]:
    ratios, static, times, checks = [], [], [], []
    for lengths in batches:
        started = time.monotonic()
        plan = plan_batch(lengths, layout, cost)
        planned = time.monotonic()
        verify_plan(plan, lengths, layout)
        times.append(planned - started)
        checks.append(time.monotonic() - planned)
        ratios.append(plan.certificate.ratio)
        bound = lower_bound(lengths, layout, cost).seconds
        static.append(_static_s(lengths, layout, cost) / bound)
    peer = "static mesh"
    mean, worst = statistics.mean(static), max(static)
    return [
        exact_row(f"makespan/bound, mean, {name}", statistics.mean(ratios), "", goal=1.01, peer=peer, peer_value=mean),
        exact_row(f"makespan/bound, worst, {name}", max(ratios), "", goal=1.03, peer=peer, peer_value=worst),
        exact_row(f"planning time, median, {name}", statistics.median(times), "s"),
        exact_row(f"proof time, median, {name}", statistics.median(checks), "s"),
    ]


def _static_s(lengths: tuple[int, ...], layout: Layout, cost: CostModel) -> float:
    """Every sequence over all ranks, packed in order into full micro-batches; all ranks do the same at all times."""
    micro_batches, filled = 1, 0
    for length in lengths:
        share = -(-length // layout.hdp)
        if filled and filled + share > layout.capacity:
            micro_batches, filled = micro_batches + 1, 0
        filled += share
    return micro_batches * cost.micro_batch_s + sum(cost.ring_s(length, layout.hdp) for length in lengths)


def _long_tailed(random: np.random.Generator, num_tokens: int, longest: int) -> tuple[int, ...]:
    lengths: list[int] = []
    while sum(lengths) < num_tokens:
        lengths.append(min(longest, 1 + int(random.lognormal(6.8, 1.7))))
    return tuple(lengths)
