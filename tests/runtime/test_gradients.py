"""The first invariant: a batch plan never changes the mathematics."""

import dataclasses

import pytest
import torch

from evermesh.parallelism import Communicator, Layout, plan_batch
from evermesh.runtime.micro_batch import LocalBatch, MicroBatchRunner
from evermesh.runtime.parameter_set import ParameterSet
from tests.runtime.parity import (
    COST,
    TOLERANCE,
    Unit,
    local_micro_batch,
    plan_by_hand,
    recomputed,
    small_model,
    worst_error,
)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_planned_gradients_equal_one_process_without_parallelism(ranks: int, dtype: str) -> None:
    lengths = (1, 97, 40, 13, 2, 61, 29, 7)
    plan = plan_batch(lengths, Layout(hdp=ranks, capacity=max(41, -(-97 // ranks))), COST)
    assert max(plan.ring_sizes()) >= min(ranks, 3)
    assert worst_error(plan, dtype) <= TOLERANCE[dtype]


def test_every_document_on_every_ring_size() -> None:
    lengths = (53, 31, 44, 17)
    units: list[Unit] = [[(0, (0, 1, 2, 3))], [(1, (3, 1, 0))], [(2, (2, 0))], [(3, (1,))]]
    assert worst_error(plan_by_hand(lengths, units, ranks=4), "float64") <= 1e-9


def test_rank_without_any_token() -> None:
    assert worst_error(plan_by_hand((23, 5), [[(0, (0, 2))], [(1, (0,))]], ranks=4), "float64") <= 1e-9


def test_ring_member_that_holds_no_token() -> None:
    assert worst_error(plan_by_hand((2, 30), [[(0, (0, 1, 2))], [(1, (1,))]], ranks=3), "float64") <= 1e-9


def test_ring_share_and_whole_documents_in_one_micro_batch() -> None:
    units: list[Unit] = [[(0, (0, 1, 2)), (1, (0, 1, 2)), (2, (0,)), (3, (2,)), (4, (2,))]]
    assert worst_error(plan_by_hand((41, 19, 6, 1, 11), units, ranks=3), "float64") <= 1e-9


def test_recomputation_of_blocks_changes_nothing() -> None:
    plan = plan_by_hand((53, 31, 8), [[(0, (0, 1, 2))], [(1, (2, 1))], [(2, (0,))]], ranks=3)
    assert worst_error(recomputed(plan), "float64") <= 1e-9


def test_batch_that_no_token_counts_in_gives_zero_gradients() -> None:
    model = small_model("float64")
    parameters = ParameterSet.whole(model)
    plan = plan_by_hand((4,), [[(0, (0,))]], ranks=1)
    local = dataclasses.replace(local_micro_batch(plan.ranks[0][0], plan.lengths), counts_T=torch.zeros(4))
    loss, _ = MicroBatchRunner(model, Communicator()).accumulate(LocalBatch((local,), plan.lengths, 0))
    assert loss.item() == 0.0
    assert parameters.gradients.abs().max().item() == 0.0
