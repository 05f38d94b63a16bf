"""The batch feed: one step ahead, in the background, the same batch everywhere."""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from evermesh.parallelism import BatchPlan, Communicator, CostModel, HybridPlanner, Layout, PlanInvalid
from evermesh.runtime import process_group
from evermesh.runtime.data import CorpusSource, DataConfig, Sampler, open_sources
from evermesh.runtime.data.corpus import token_dtype
from evermesh.runtime.feed import BatchFeed
from tests.cluster import RankFailed, run_ranks

COST = CostModel(token_s=1e-5, pair_s=1e-8)


def _feed(corpus: Path, planner: Any, layout: Layout, control: Communicator, seed: int = 0) -> BatchFeed:
    config = DataConfig(sources=(CorpusSource(path=corpus),), context=512, batch_tokens=1500)
    corpora = open_sources(config)
    return BatchFeed(Sampler(corpora, config, seed), corpora, planner, layout, control)


class _WatchedPlanner:
    """Plans, and tells which thread asked and when it was done."""

    def __init__(self, layout: Layout) -> None:
        self.inner = HybridPlanner(layout, COST)
        self.threads: list[str] = []
        self.planned = threading.Semaphore(0)

    def plan(self, lengths: Sequence[int]) -> BatchPlan:
        self.threads.append(threading.current_thread().name)
        plan = self.inner.plan(lengths)
        self.planned.release()
        return plan


def test_the_next_batch_is_planned_in_the_background_before_anyone_asks_for_it(corpus: Path) -> None:
    layout = Layout(capacity=600)
    planner = _WatchedPlanner(layout)
    with _feed(corpus, planner, layout, Communicator()) as feed:
        assert planner.planned.acquire(timeout=20)
        feed.next()
        assert planner.planned.acquire(timeout=20), "the second plan was not made while the first batch is in use"
        feed.next(last=True)
    assert len(planner.threads) == 2
    assert all(name.startswith("batch-feed") for name in planner.threads)


def test_the_state_of_a_batch_is_that_after_it_not_after_the_one_ahead(corpus: Path) -> None:
    layout = Layout(capacity=600)
    with _feed(corpus, HybridPlanner(layout, COST), layout, Communicator()) as feed:
        first, second = feed.next(), feed.next(last=True)
    config = DataConfig(sources=(CorpusSource(path=corpus),), context=512, batch_tokens=1500)
    sampler = Sampler(open_sources(config), config, 0)
    sampler.load_state_dict(first.sampler_state)
    assert sampler.next_batch().digest == second.batch.digest


class _BrokenPlanner:
    """Leaves out the last micro-batch of rank 0."""

    def __init__(self, layout: Layout) -> None:
        self.inner = HybridPlanner(layout, COST)

    def plan(self, lengths: Sequence[int]) -> BatchPlan:
        import dataclasses

        plan = self.inner.plan(lengths)
        return dataclasses.replace(plan, ranks=(plan.ranks[0][:-1], *plan.ranks[1:]))


def test_a_plan_that_fails_its_proof_is_never_used(corpus: Path) -> None:
    layout = Layout(capacity=600)
    with _feed(corpus, _BrokenPlanner(layout), layout, Communicator()) as feed, pytest.raises(PlanInvalid):
        feed.next(last=True)


def _tokens_of_rank(rank: int, world_size: int, corpus: Path, seeds: list[int]) -> list[tuple[str, int, int, int]]:
    layout = Layout(hdp=world_size, capacity=300)
    control = Communicator(dist.new_group(backend="gloo"))
    taken = []
    with _feed(corpus, HybridPlanner(layout, COST), layout, control, seed=seeds[rank]) as feed:
        for number in range(3):
            batch = feed.next(last=number == 2)
            own = sum(local.tokens_T.numel() for local in batch.local.micro_batches)
            counted = sum(int(local.counts_T.sum()) for local in batch.local.micro_batches)
            taken.append((batch.batch.digest, own, counted, batch.local.num_counted))
    return taken


def test_ranks_share_out_the_batch_and_agree_on_what_counts(corpus: Path) -> None:
    for steps in zip(*run_ranks(3, _tokens_of_rank, corpus, [0, 0, 0]), strict=True):
        assert len({digest for digest, *_ in steps}) == 1
        assert {total for *_, total in steps} == {sum(counted for _, _, counted, _ in steps)}
        assert np.std([own for _, own, *_ in steps]) < 300


def test_a_rank_that_draws_another_batch_is_found_at_the_first_step(corpus: Path) -> None:
    with pytest.raises(RankFailed, match="PlanInvalid: rank 1 drew batch"):
        run_ranks(2, _tokens_of_rank, corpus, [0, 7])


def _bytes_read(
    rank: int, workers: int, corpus: Path, layout: Layout, ranks_per_node: int
) -> tuple[int, int, list[Any]]:
    """What this rank read of two batches, what all their tokens are in the files, and the tokens that it got."""
    os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
    groups = process_group.communicators(60.0, layout)
    config = DataConfig(sources=(CorpusSource(path=corpus),), context=512, batch_tokens=1500)
    corpora = open_sources(config)
    sampler = Sampler(corpora, config, 0)
    with BatchFeed(sampler, corpora, HybridPlanner(layout, COST), layout, groups.control, groups.readers) as feed:
        batches = [feed.next(), feed.next(last=True)]
    item_bytes = token_dtype(corpora[0].vocabulary).itemsize
    # every stretch of a piece is read with the token behind it
    stored = [
        (stop - start + 1) * item_bytes
        for batch in batches
        for micro_batches in batch.plan.ranks
        for micro_batch in micro_batches
        for piece in micro_batch.pieces
        for start, stop in piece.ranges
    ]
    local = [[(mb.tokens_T.tolist(), mb.targets_T.tolist()) for mb in batch.local.micro_batches] for batch in batches]
    return corpora[0].bytes_read, sum(stored), local


@pytest.mark.parametrize(("ranks_per_node", "nodes"), [(4, 1), (2, 1), (1, 2)])
def test_a_node_reads_every_token_once_whatever_shares_it(ranks_per_node: int, nodes: int, corpus: Path) -> None:
    """Four ranks, two for each HDP rank: neighbours, so that with one rank on a node both nodes of a pair read."""
    layout = Layout(hdp=2, tp=2, capacity=300)
    results = run_ranks(4, _bytes_read, corpus, layout, ranks_per_node)
    assert sum(read for read, _, _ in results) == nodes * results[0][1]
    assert results[0][2] == results[1][2]
    assert results[2][2] == results[3][2]
    assert results[0][2] != results[2][2]
