"""Simulated steps against real ones: random plans on gloo ranks, each pinned to a core.

Coefficients are fitted once, on plans of their own (least squares of the logarithm of predicted over measured), through the
simulator itself. Then other plans are predicted. In every round each plan runs once, so that the load of the machine hits all
alike; the figure of a plan is its fastest round, since others on the machine only ever add time. A machine with two cores
runs two ranks honestly: four share cores, and no cost model knows who has the core.
"""

import os
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from evermesh.parallelism import BatchPlan, Certificate, Communicator, CostModel, Layout, MicroBatch, Piece
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.simulator import Scenario, simulate_events
from evermesh.runtime.micro_batch import LocalBatch, LocalMicroBatch, MicroBatchRunner
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.decoder import Decoder
from tests.benchmarks.harness import Row, exact_row
from tests.cluster import run_ranks

MODEL = ModelConfig(hidden=64, layers=1, heads=2, kv_heads=2, ffn=128)
VOCABULARY = 64
FITTED_ON, PREDICTED, ROUNDS = 24, 50, 16
COEFFICIENTS = ("token_s", "pair_s", "micro_batch_s", "piece_s", "ring_step_s", "ring_token_s")
START = CostModel(token_s=5e-6, pair_s=5e-10, micro_batch_s=5e-3, piece_s=5e-4, ring_step_s=3e-3, ring_token_s=1e-6)


class Prediction(NamedTuple):
    """How well steps were predicted."""

    rank_correlation: float
    """Spearman's."""
    ratio_errors: list[float]
    """Of every two plans: how far the predicted ratio of their times is from the measured, 0 being right."""

    def quantile(self, share: float) -> float:
        """The error that this share of ratios stays under."""
        return sorted(self.ratio_errors)[min(len(self.ratio_errors) - 1, int(share * len(self.ratio_errors)))]


def run() -> list[Row]:
    """Rank correlation and errors of ratios, on two ranks, and on four where every one has a core."""
    rows = []
    for ranks in (2, 4):
        if ranks > (os.cpu_count() or 1):
            continue
        plans = [random_plan(random.Random(seed), ranks) for seed in range(FITTED_ON + PREDICTED)]
        measured = measure(plans, ranks, ROUNDS)
        cost = fitted(plans[:FITTED_ON], measured[:FITTED_ON])
        print(f"{ranks} ranks: {cost.model_dump(include=set(COEFFICIENTS))}")
        for layers in (None,) if ranks == 2 else (None, MODEL.layers):  # a ring of two has one step, and no difference
            found = compare(plans[FITTED_ON:], measured[FITTED_ON:], cost, layers)
            what = f"{PREDICTED} plans, {ranks} ranks, " + ("joined" if layers is None else "layer by layer")
            rows += [
                exact_row(f"rank correlation, {what}", found.rank_correlation, "", goal=0.9),
                exact_row(f"median error of ratios, {what}", found.quantile(0.5), "", goal=0.25),
                exact_row(f"95 % of errors of ratios under, {what}", found.quantile(0.95), ""),
            ]
    return rows


def random_plan(draw: random.Random, ranks: int) -> BatchPlan:
    """Packs and rings of any size, in one order for all; ranks have more or less to do."""
    lengths: list[int] = []
    found: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    favoured = draw.randrange(ranks)
    for _ in range(draw.randint(1, 5)):
        size = draw.randint(1, ranks)
        members = draw.sample(range(ranks), size)
        if draw.random() < 0.3 and favoured not in members:
            members[0] = favoured
        pieces: dict[int, list[Piece]] = {member: [] for member in members}
        for _ in range(draw.choice([1, 1, 2, 6])):
            length = int(2 ** draw.uniform(5, 10)) if size == 1 else size * int(2 ** draw.uniform(5, 9.5))
            for index, member in enumerate(members):
                ranges = share_of(length, size, index).ranges()
                pieces[member].append(Piece(len(lengths), ranges, tuple(members)))
            lengths.append(length)
        for member, of_member in pieces.items():
            found[member].append(MicroBatch(tuple(of_member)))
    return BatchPlan(
        tuple(lengths), sum(lengths), tuple(map(tuple, found)), Certificate(0.0, 0.0, "nothing"), "random", 0, 0
    )


def measure(plans: Sequence[BatchPlan], ranks: int, rounds: int) -> list[float]:
    """Seconds of the forward and backward passes of every plan on real ranks, in the fastest of ``rounds``."""
    of_rank = run_ranks(ranks, _measure, plans, rounds, timeout_s=1500)
    # a step is as long as its slowest rank says; barriers make all but the same of them
    return [min(max(times) for times in zip(*of_plan, strict=True)) for of_plan in zip(*of_rank, strict=True)]


def _measure(rank: int, world_size: int, plans: Sequence[BatchPlan], rounds: int) -> list[list[float]]:
    import torch.distributed as dist

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    communicator = Communicator(dist.group.WORLD)
    model = Decoder(MODEL, VOCABULARY)
    model.initialize(0)
    runner = MicroBatchRunner(model, communicator)
    batches = [_local(plan, rank) for plan in plans]
    seconds: list[list[float]] = [[] for _ in plans]
    for number in range(rounds + 1):
        for batch, of_plan in zip(batches, seconds, strict=True):
            communicator.barrier("start")
            started = time.monotonic()
            runner.accumulate(batch)
            communicator.barrier("end")
            if number > 0:  # the first round warms up
                of_plan.append(time.monotonic() - started)
    return seconds


def _local(plan: BatchPlan, rank: int) -> LocalBatch:
    generator = torch.Generator().manual_seed(rank)
    micro_batches = []
    for micro_batch in plan.ranks[rank]:
        tokens = torch.randint(VOCABULARY, (micro_batch.num_tokens,), generator=generator)
        positions = [torch.arange(*part) for piece in micro_batch.pieces for part in piece.ranges]
        counts = torch.ones(micro_batch.num_tokens)
        micro_batches.append(LocalMicroBatch(micro_batch, tokens, tokens, torch.cat(positions), counts))
    return LocalBatch(tuple(micro_batches), plan.lengths, plan.num_tokens)


def predicted(plan: BatchPlan, cost: CostModel, layers: int | None = None) -> float:
    """Seconds of ``plan`` as the simulator says."""
    ranks = len(plan.ranks)
    scenario = Scenario(Pool.of(ranks), layers=layers)
    return simulate_events(plan, Layout(hdp=ranks, capacity=plan.capacity), cost, scenario).timeline.makespan_s


def fitted(plans: Sequence[BatchPlan], measured: Sequence[float]) -> CostModel:
    """The coefficients that predict ``plans`` best: least squares of logarithms."""

    def cost_of(logarithms: Sequence[float]) -> CostModel:
        return START.model_copy(update=dict(zip(COEFFICIENTS, np.exp(logarithms).tolist(), strict=True)))

    def errors(logarithms: Sequence[float]) -> list[float]:
        cost = cost_of(logarithms)
        return [float(np.log(predicted(plan, cost) / seconds)) for plan, seconds in zip(plans, measured, strict=True)]

    start = np.log([getattr(START, name) for name in COEFFICIENTS])
    # soft_l1: a step that the machine disturbed does not pull all others
    return cost_of(least_squares(errors, start, loss="soft_l1", f_scale=0.1, bounds=(start - 6, start + 6)).x)


def compare(plans: Sequence[BatchPlan], measured: Sequence[float], cost: CostModel, layers: int | None) -> Prediction:
    """How well ``plans`` are predicted."""
    expected = [predicted(plan, cost, layers) for plan in plans]
    logarithms = np.log(np.array(expected) / np.array(measured))
    differences = np.abs(logarithms[:, None] - logarithms[None, :])[np.triu_indices(len(plans), 1)]
    return Prediction(
        float(spearmanr(expected, measured).statistic), [float(error) for error in np.exp(differences) - 1]
    )
