"""Plans against their bound, a brute-force optimum and an independent proof."""

import itertools
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.parallelism import (
    BatchPlan,
    CostModel,
    Layout,
    MicroBatch,
    Piece,
    SequenceTooLong,
    plan_batch,
    simulate,
    verify_plan,
)
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.planner import lower_bound
from evermesh.parallelism.simulator import makespan_s

COST = CostModel(token_s=1e-5, pair_s=2e-9, micro_batch_s=1e-3, piece_s=1e-4, ring_step_s=1e-4, ring_token_s=1e-6)
LENGTHS = st.lists(st.one_of(st.integers(1, 60), st.integers(60, 4000)), max_size=60)


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS, hdp=st.integers(1, 12), capacity=st.sampled_from([400, 1000, 4000]))
def test_every_plan_passes_the_proof_or_is_refused_with_the_numbers(
    lengths: list[int], hdp: int, capacity: int
) -> None:
    if max(lengths, default=0) > hdp * capacity:
        with pytest.raises(SequenceTooLong, match=f"{hdp} HDP ranks"):
            plan_batch(lengths, Layout(hdp=hdp, capacity=capacity), COST)
        return
    plan = plan_batch(lengths, Layout(hdp=hdp, capacity=capacity), COST)
    verify_plan(plan, lengths, Layout(hdp=hdp, capacity=capacity))
    assert plan.certificate.makespan_s == pytest.approx(simulate(plan, COST).makespan_s)
    assert plan.certificate.makespan_s >= plan.certificate.lower_bound_s * (1 - 1e-12)
    assert BatchPlan.from_json(plan.to_json()) == plan


def _whole(sequences: tuple[int, ...], lengths: list[int], rank: int) -> MicroBatch:
    return MicroBatch(tuple(Piece(i, ((0, lengths[i]),), (rank,)) for i in sequences))


@pytest.mark.parametrize("lengths", [[700, 650, 400, 300, 90, 20], [1000, 20, 20, 20, 20, 20], [512] * 5, [5, 900, 77]])
def test_whole_sequences_are_near_the_best_of_all_assignments(lengths: list[int]) -> None:
    """With one micro-batch per rank and no rings, every assignment can be tried."""
    cost = COST.model_copy(update={"ring_step_s": 1.0})
    capacity, ranks = sum(lengths), 2
    best = min(
        makespan_s(
            [[_whole(tuple(i for i, r in enumerate(choice) if r == rank), lengths, rank)] for rank in range(ranks)],
            lengths,
            cost,
        )
        for choice in itertools.product(range(ranks), repeat=len(lengths))
    )
    plan = plan_batch(lengths, Layout(hdp=ranks, capacity=capacity), cost)
    assert plan.certificate.lower_bound_s <= best * (1 + 1e-12)
    assert plan.certificate.makespan_s <= best * 1.1


def test_long_sequence_gets_the_ring_that_its_memory_needs() -> None:
    plan = plan_batch([7000, 100, 100], Layout(hdp=8, capacity=2000), COST.model_copy(update={"ring_step_s": 0.1}))
    assert plan.ring_sizes() == {1: 2, 4: 1}


def test_heavy_sequence_gets_more_ranks_than_its_memory_needs() -> None:
    plan = plan_batch([8000], Layout(hdp=8, capacity=8000), COST)
    assert plan.ring_sizes() == {8: 1}
    assert plan.certificate.binding == "longest sequence"


def test_ranks_may_run_different_numbers_of_micro_batches() -> None:
    cost = COST.model_copy(update={"pair_s": 2e-8, "ring_step_s": 1.0})
    plan = plan_batch([1900, *[250] * 12], Layout(hdp=2, capacity=2000), cost)
    assert len({len(micro_batches) for micro_batches in plan.ranks}) > 1


def test_empty_batch_gives_an_empty_plan() -> None:
    plan = plan_batch([], Layout(hdp=3), COST)
    assert plan.ranks == ((), (), ())
    assert plan.certificate.ratio == 1.0


def test_length_of_zero_is_refused() -> None:
    with pytest.raises(LayoutDoesNotFit, match="sequence 1 has 0 tokens"):
        plan_batch([5, 0], Layout(hdp=1), COST)


def test_bound_of_one_rank_is_the_sum_of_all_work() -> None:
    lengths = [900, 40, 333]
    expected = sum(COST.whole_s(length) for length in lengths) + COST.micro_batch_s
    assert lower_bound(lengths, Layout(hdp=1, capacity=2000), COST).seconds == pytest.approx(expected)


def test_plans_are_the_same_in_every_process_and_hash_seed_compiled_or_not() -> None:
    program = (
        "import hashlib, random; from evermesh.parallelism import CostModel, Layout, Pool, plan_batch;"
        "r = random.Random(4); lengths = [min(9000, int(r.lognormvariate(6, 1.5)) + 1) for _ in range(400)];"
        f"cost = CostModel.model_validate_json('{COST.model_dump_json()}');"
        "pool = Pool.of(16, 4, speeds=(1.0,) * 15 + (0.7,));"
        "print(hashlib.sha256(plan_batch(lengths, Layout(hdp=16, capacity=1000), cost, pool=pool).to_json()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed, "EVERMESH_PLANNER": mode},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, mode in (("0", "compiled"), ("77", "compiled"), ("1", "python"))
    }
    assert len(digests) == 1
