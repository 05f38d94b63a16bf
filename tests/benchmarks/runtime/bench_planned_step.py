"""Planned batches against a static context-parallel mesh and against data parallelism with padding.

The same batches of the same corpus, the same model, kernels and ranks; in every round each way runs one whole step
(forward, backward, gradient and parameter traffic, update), so that the load of the machine hits all alike. The peers
are restated from their papers' and libraries' behaviour on our own executor: torch's context_parallel does not run on
CPU. All three must give the same loss.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from evermesh.launcher.job_file import load_job
from evermesh.parallelism import ByteLedger, Communicator, CostModel, Layout, MicroBatch, Piece
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.planner import plan_batch
from evermesh.runtime.cost import nominal_cost
from evermesh.runtime.data import Batch, Corpus, Sampler, open_sources
from evermesh.runtime.feed import load_micro_batch
from evermesh.runtime.lamb import build_optimizer
from evermesh.runtime.micro_batch import LocalBatch, LocalMicroBatch, MicroBatchRunner
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.parameter_set import ParameterSet
from tests.benchmarks.harness import Row, paired_row
from tests.cluster import run_ranks

ROUNDS = 6
PLANNED, STATIC, PADDED = "planned", "static context-parallel mesh", "data parallelism with padding"
DOCUMENTS_PER_PADDED_BATCH = 2
CONFIG = load_job(Path("deploy/jobs/quickstart.yaml")).train
LAYOUTS = (Layout(hdp=2, capacity=4096), CONFIG.layout)
Work = tuple[list[LocalMicroBatch], tuple[int, ...]]
"""A rank's micro-batches, and the length of every sequence (with its padding)."""


def run() -> list[Row]:
    """Tokens per second and bytes per step of the three ways, on two ranks and on the demo's four."""
    open_sources(CONFIG.data)  # prepare the corpus before the ranks start
    return [row for layout in LAYOUTS for row in _compare(layout)]


def _compare(layout: Layout) -> list[Row]:
    results = run_ranks(layout.hdp, _measure, layout, timeout_s=1500)
    tokens_per_s = {way: [step[way][0] for step in results[0]] for way in (PLANNED, STATIC, PADDED)}
    num_bytes = {way: [sum(rank[i][way][1] for rank in results) for i in range(ROUNDS)] for way in tokens_per_s}
    return [
        paired_row(f"{what}, {layout.hdp} ranks", measured[PLANNED], unit, peer=peer, peer_values=measured[peer])
        for what, unit, measured in (
            ("tokens per second", "tokens/s", tokens_per_s),
            ("bytes sent per step", "bytes", num_bytes),
        )
        for peer in (STATIC, PADDED)
    ]


def _measure(rank: int, world_size: int, layout: Layout) -> list[dict[str, tuple[float, int]]]:
    """For every round and way: tokens per second of the step, and bytes that this rank sent."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    communicator, ledger = Communicator(dist.group.WORLD), ByteLedger()
    corpora = open_sources(CONFIG.data)
    model = Decoder(CONFIG.model, corpora[0].vocabulary)
    model.initialize(0)
    parameters = ParameterSet.whole(model, communicator)
    optimizer = build_optimizer([parameters], CONFIG.optimizer)
    runner = MicroBatchRunner(model, communicator)
    sampler = Sampler(corpora, CONFIG.data, seed=1)
    cost = nominal_cost(CONFIG, CONFIG.model.shape(corpora[0].vocabulary))
    rounds = []
    with communicator.listen(ledger):
        for number in range(ROUNDS + 1):
            batch = sampler.next_batch()
            ways: dict[str, Work] = {
                PLANNED: _planned(batch, corpora, rank, layout, cost),
                STATIC: _static(batch, corpora, rank, layout),
                PADDED: _padded(batch, corpora, rank, world_size),
            }
            steps, losses = {}, []
            for way, (micro_batches, lengths) in ways.items():
                communicator.barrier("start")
                ledger.take()
                started = time.monotonic()
                parameters.begin_step()
                loss, _ = runner.accumulate(LocalBatch(tuple(micro_batches), lengths, sum(batch.lengths)))
                parameters.sum_gradients()
                optimizer.step(lr=0.0, gradient_scale=1.0)  # the full update, with the parameters left where they are
                communicator.barrier("end")
                seconds = time.monotonic() - started
                steps[way] = sum(batch.lengths) / seconds, sum(ledger.take().values())
                communicator.all_reduce(loss, "check")
                losses.append(loss.item())
            assert max(losses) - min(losses) <= 1e-5 * losses[0], losses
            if number > 0:  # the first round warms up
                rounds.append(steps)
    return rounds


def _planned(batch: Batch, corpora: Sequence[Corpus], rank: int, layout: Layout, cost: CostModel) -> Work:
    plan = plan_batch(batch.lengths, layout, cost)
    return [load_micro_batch(micro_batch, batch, corpora) for micro_batch in plan.ranks[rank]], plan.lengths


def _static(batch: Batch, corpora: Sequence[Corpus], rank: int, layout: Layout) -> Work:
    """Every sequence over all ranks; sequences are packed in order into micro-batches of the same capacity per rank."""
    ring = tuple(range(layout.hdp))
    packs: list[list[Piece]] = [[]]
    largest = 0
    for sequence, length in enumerate(batch.lengths):
        share = max(share_of(length, layout.hdp, member).num_tokens for member in ring)
        if packs[-1] and largest + share > layout.capacity:
            packs.append([])
            largest = 0
        largest += share
        packs[-1].append(Piece(sequence, share_of(length, layout.hdp, rank).ranges(), ring))
    return [load_micro_batch(MicroBatch(tuple(pack)), batch, corpora) for pack in packs], tuple(batch.lengths)


def _padded(batch: Batch, corpora: Sequence[Corpus], rank: int, ranks: int) -> Work:
    """Documents dealt out in order; each micro-batch holds two, padded to the longer one; memory is no limit here."""
    own = range(rank, len(batch.lengths), ranks)
    lengths = list(batch.lengths)
    micro_batches = []
    for first in range(0, len(own), DOCUMENTS_PER_PADDED_BATCH):
        sequences = own[first : first + DOCUMENTS_PER_PADDED_BATCH]
        longest = max(batch.lengths[sequence] for sequence in sequences)
        parts = []
        for sequence in sequences:
            lengths[sequence] = longest
            whole = MicroBatch((Piece(sequence, ((0, batch.lengths[sequence]),), (rank,)),))
            parts.append(_pad(load_micro_batch(whole, batch, corpora), longest))
        plan = MicroBatch(tuple(Piece(sequence, ((0, longest),), (rank,)) for sequence in sequences))
        columns = ("tokens_T", "targets_T", "positions_T", "counts_T")
        micro_batches.append(
            LocalMicroBatch(plan, *(torch.cat([getattr(part, column) for part in parts]) for column in columns))
        )
    return micro_batches, tuple(lengths)


def _pad(local: LocalMicroBatch, length: int) -> LocalMicroBatch:
    missing = length - local.tokens_T.numel()
    return dataclasses.replace(
        local,
        tokens_T=torch.nn.functional.pad(local.tokens_T, (0, missing)),
        targets_T=torch.nn.functional.pad(local.targets_T, (0, missing)),
        positions_T=torch.arange(length),
        counts_T=torch.nn.functional.pad(local.counts_T, (0, missing)),
    )
