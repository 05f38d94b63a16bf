"""Mended plans against the proof, the simulator, the bound of the ranks that are left; moved tokens counted one by one."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from evermesh.parallelism import (
    BatchPlan,
    CostModel,
    Layout,
    MicroBatch,
    Piece,
    Pool,
    SequenceTooLong,
    plan_batch,
    verify_plan,
)
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.planner import Replanned, bound_for, replan_batch
from evermesh.parallelism.simulator import Scenario, simulate_events
from tests.benchmarks.parallelism.lengths import byted, github

COST = CostModel(
    token_s=1e-5,
    pair_s=2e-9,
    micro_batch_s=1e-3,
    piece_s=1e-4,
    ring_step_s=1e-4,
    ring_token_s=1e-6,
    network_step_s=2e-4,
    network_token_s=4e-6,
    head_token_s=1e-7,
    recompute_token_s=3e-6,
)
LENGTHS = st.lists(st.one_of(st.integers(1, 60), st.integers(60, 4000)), max_size=60)


def _check(old: BatchPlan, found: Replanned, cost: CostModel, lost: set[int]) -> None:
    """What holds of every new plan, whatever happened."""
    verify_plan(found.plan, old.lengths, found.layout)
    outcome = simulate_events(found.plan, found.layout, cost, Scenario(pool=found.pool))
    assert found.plan.certificate.makespan_s == pytest.approx(outcome.timeline.makespan_s, rel=1e-9)
    bound = bound_for(old.lengths, found.layout, cost, found.pool)
    assert found.plan.certificate.lower_bound_s == pytest.approx(bound.seconds, rel=1e-12)
    assert BatchPlan.from_json(found.plan.to_json()) == found.plan
    assert (found.moved_sequences, found.moved_tokens) == _moved_one_by_one(old, found.plan, lost)


def _moved_one_by_one(old: BatchPlan, new: BatchPlan, lost: set[int]) -> tuple[int, int]:
    """Sequences and tokens that some rank holds now and did not hold, token by token."""
    left = [rank for rank in range(len(old.ranks)) if rank not in lost]
    sequences, tokens = set(), 0
    for rank, micro_batches in zip(left, new.ranks, strict=True):
        missing = _tokens_of(micro_batches) - _tokens_of(old.ranks[rank])
        sequences |= {sequence for sequence, _ in missing}
        tokens += len(missing)
    return len(sequences), tokens


def _tokens_of(micro_batches: tuple[MicroBatch, ...]) -> set[tuple[int, int]]:
    return {
        (piece.sequence, token)
        for micro_batch in micro_batches
        for piece in micro_batch.pieces
        for token_range in piece.ranges
        for token in range(*token_range)
    }


@settings(max_examples=25, deadline=None)
@example(lengths=[1, 1, 2], hdp=2, seed=0, ulysses=1)  # both ranks at 0.8: rings overlapped
@given(lengths=LENGTHS, hdp=st.integers(2, 40), seed=st.integers(0, 1000), ulysses=st.sampled_from([1, 4]))
def test_every_new_plan_is_right_and_says_what_it_moves(lengths: list[int], hdp: int, seed: int, ulysses: int) -> None:
    drawn = random.Random(seed)
    layout = Layout(hdp=hdp, capacity=500, activations="recompute", keep_capacity=200, ulysses=ulysses)
    pool = Pool.of(hdp, 4, [drawn.choice([1.0, 1.0, 1.0, 0.8]) for _ in range(hdp)])
    lost = set(drawn.sample(range(hdp), drawn.randint(0, min(hdp - 1, 4))))
    speeds = tuple(drawn.choice([speed, speed, speed, 0.6]) for speed in pool.speeds)
    if max(lengths, default=0) > (hdp - len(lost)) * layout.capacity:
        lengths = [length for length in lengths if length <= (hdp - len(lost)) * layout.capacity]
    plan = plan_batch(lengths, layout, COST, pool=pool)
    found = replan_batch(plan, layout, COST, pool=pool, lost=lost, speeds=speeds)
    assert found.pool == Pool(pool.nodes, speeds).without(lost)
    _check(plan, found, COST, lost)


LARGE = COST.model_copy(update={"token_s": 2.6e-4, "pair_s": 1.5e-8, "micro_batch_s": 0.02})
RANKS = 1536


def _large_plan() -> tuple[BatchPlan, Layout, Pool]:
    layout, pool = Layout(hdp=RANKS, capacity=8192), Pool.of(RANKS, 8)
    return plan_batch(byted(0, 64 << 20, 2 << 20), layout, LARGE, pool=pool), layout, pool


def test_of_1536_ranks_two_are_lost_and_one_is_slow_and_few_sequences_move() -> None:
    plan, layout, pool = _large_plan()
    speeds = [0.7 if rank == 700 else 1.0 for rank in range(RANKS)]
    found = replan_batch(plan, layout, LARGE, pool=pool, lost={3, 900}, speeds=speeds)
    assert found.anew is None
    assert found.plan.certificate.ratio <= 1.02
    assert found.share_moved < 0.05
    verify_plan(found.plan, plan.lengths, found.layout)
    outcome = simulate_events(found.plan, found.layout, LARGE, Scenario(pool=found.pool))
    assert found.plan.certificate.makespan_s == pytest.approx(outcome.timeline.makespan_s, rel=1e-9)


@pytest.mark.parametrize(("draw", "seed", "number"), [(byted, 1, 1), (byted, 2, 2), (github, 0, 1), (github, 2, 8)])
def test_sequences_too_long_for_the_time_that_is_left_take_the_place_of_short_ones(
    draw: Callable[[int, int, int], list[int]], seed: int, number: int
) -> None:
    """Batches whose mended plans ended 2 to 8 % behind the bound while the longest went where most time was left."""
    layout, pool = Layout(hdp=RANKS, capacity=8192), Pool.of(RANKS, 8)
    plan = plan_batch(draw(seed, 64 << 20, 2 << 20), layout, LARGE, pool=pool)
    lost = random.Random(seed).sample(range(RANKS), number)
    found = replan_batch(plan, layout, LARGE, pool=pool, lost=lost)
    assert found.anew is None
    assert found.plan.certificate.ratio <= 1.02
    assert found.moved_tokens < 0.05 * plan.num_tokens
    verify_plan(found.plan, plan.lengths, found.layout)


@pytest.mark.parametrize("number", [1, 20])
def test_rings_of_1536_ranks_leave_slow_ranks_and_nodes_with_a_rank_less_out(number: int) -> None:
    drawn = random.Random(number)
    speeds = [1.0] * RANKS
    for rank in drawn.sample(range(RANKS), number):
        speeds[rank] = drawn.uniform(0.5, 0.95)
    pool = Pool.of(RANKS, 8, speeds).without(drawn.sample(range(RANKS), 7))
    layout = Layout(hdp=len(pool), capacity=8192)
    lengths = byted(0, 64 << 20, 2 << 20)
    plan = plan_batch(lengths, layout, LARGE, pool=pool)
    assert plan.certificate.ratio <= 1.02
    outcome = simulate_events(plan, layout, LARGE, Scenario(pool=pool))
    assert plan.certificate.makespan_s == pytest.approx(outcome.timeline.makespan_s, rel=1e-9)


def test_others_keep_their_shares_when_a_rank_of_a_ring_is_lost() -> None:
    """One ring, whole sequences elsewhere: the ring keeps its order, with a substitute of the same node in one place."""
    layout, pool = Layout(hdp=24, capacity=1000), Pool.of(24, 8)
    cost = COST.model_copy(update={"pair_s": 0.0, "piece_s": 0.0, "micro_batch_s": 1e-6})
    plan = plan_batch([4000, *[10] * 8000], layout, cost, pool=pool)
    ring = next(p.ring for of_rank in plan.ranks for m in of_rank for p in m.pieces if p.sequence == 0)
    found = replan_batch(plan, layout, cost, pool=pool, lost={ring[1]})
    assert found.anew is None
    assert found.plan.ring_sizes()[len(ring)] == 1
    new = next(p.ring for of_rank in found.plan.ranks for m in of_rank for p in m.pieces if p.sequence == 0)
    moved_up = [rank - (rank > ring[1]) for rank in ring]
    assert [place for place, rank in enumerate(new) if rank != moved_up[place]] == [1]
    assert pool.without({ring[1]}).nodes[new[1]] == pool.nodes[ring[0]]
    _check(plan, found, cost, {ring[1]})


def test_a_ring_for_which_nobody_is_free_runs_behind_that_of_its_new_member() -> None:
    """Three rings of two on six ranks, all at the beginning, three packs of whole sequences behind each."""
    layout = Layout(hdp=6, capacity=1000)
    cost = COST.model_copy(update={"pair_s": 0.0, "piece_s": 0.0, "micro_batch_s": 1e-6})
    lengths = [1900] * 3 + [10] * 1800
    ranks = []
    for rank in range(6):
        ring = (rank // 2 * 2, rank // 2 * 2 + 1)
        packs = [range(first, first + 100) for first in range(3 + 300 * rank, 3 + 300 * (rank + 1), 100)]
        whole = [tuple(Piece(sequence, ((0, 10),), (rank,)) for sequence in pack) for pack in packs]
        shared = (Piece(rank // 2, share_of(1900, 2, rank % 2).ranges(), ring),)
        ranks.append(tuple(MicroBatch(pieces) for pieces in (shared, *whole)))
    plan = replace(plan_batch(lengths, layout, cost), ranks=tuple(ranks))
    verify_plan(plan, lengths, layout)
    found = replan_batch(plan, layout, cost, lost={1})
    assert found.anew is None
    members = next(p.ring for of_rank in found.plan.ranks for m in of_rank for p in m.pieces if p.sequence == 0)
    rings_of = [[p.sequence for m in found.plan.ranks[rank] for p in m.pieces if len(p.ring) > 1] for rank in members]
    assert members[0] == 0
    assert rings_of[0] == [0]
    assert rings_of[1] in ([1, 0], [2, 0])
    assert found.plan.certificate.ratio <= 1.02
    _check(plan, found, cost, {1})


def test_nothing_moves_when_nothing_happened() -> None:
    layout, pool = Layout(hdp=48, capacity=1000), Pool.of(48, 8)
    plan = plan_batch([random.Random(i).randint(1, 3000) for i in range(400)], layout, COST, pool=pool)
    found = replan_batch(plan, layout, COST, pool=pool)
    assert (found.anew, found.moved_sequences, found.moved_tokens) == (None, 0, 0)
    assert found.plan.certificate.makespan_s == pytest.approx(plan.certificate.makespan_s, rel=1e-9)


def test_ranks_that_keep_step_are_planned_anew_and_it_says_so() -> None:
    layout = Layout(pp=2, hdp=4, capacity=1000)
    plan = plan_batch([300] * 40, layout, COST)
    found = replan_batch(plan, layout, COST, lost={1})
    assert "waves" in (found.anew or "")
    _check(plan, found, COST, {1})


def test_what_cannot_be_is_refused_with_the_numbers() -> None:
    layout = Layout(hdp=2, capacity=1000)
    plan = plan_batch([1500, 20], layout, COST)
    with pytest.raises(SequenceTooLong):
        replan_batch(plan, layout, COST, lost={1})
    with pytest.raises(LayoutDoesNotFit, match="ranks 0 to 1"):
        replan_batch(plan, layout, COST, lost={2})
    with pytest.raises(LayoutDoesNotFit, match="all 2 ranks"):
        replan_batch(plan, layout, COST, lost={0, 1})
    with pytest.raises(LayoutDoesNotFit, match="the pool has 3"):
        replan_batch(plan, layout, COST, pool=Pool.of(3))


def test_mended_plans_are_the_same_compiled_or_not() -> None:
    program = (
        "import hashlib, random; from evermesh.parallelism import CostModel, Layout, Pool, plan_batch;"
        "from evermesh.parallelism.planner import replan_batch;"
        "r = random.Random(4); lengths = [min(9000, int(r.lognormvariate(6, 1.5)) + 1) for _ in range(600)];"
        f"cost = CostModel.model_validate_json('{COST.model_dump_json()}');"
        "layout, pool = Layout(hdp=48, capacity=1000), Pool.of(48, 8);"
        "plan = plan_batch(lengths, layout, cost, pool=pool);"
        "found = replan_batch(plan, layout, cost, pool=pool, lost={7, 30}, speeds=[1.0] * 20 + [0.7] + [1.0] * 27);"
        "print(hashlib.sha256(found.plan.to_json()).hexdigest(), found.anew, found.moved_sequences, found.moved_tokens)"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"EVERMESH_PLANNER": mode},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for mode in ("compiled", "python")
    }
    assert len(printed) == 1, printed
