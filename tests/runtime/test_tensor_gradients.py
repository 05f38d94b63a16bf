"""Tensor and sequence parallelism never changes the mathematics, whatever the batch plan."""

import pytest

from evermesh.parallelism import Layout, plan_batch
from tests.runtime.parity import (
    COST,
    MANY_HEADS,
    MODEL,
    TOLERANCE,
    VOCABULARY,
    Unit,
    plan_by_hand,
    recomputed,
    worst_error,
)

LENGTHS = (1, 97, 40, 13, 2, 61, 29, 7)


def _error(hdp: int, tp: int, dtype: str, *, recompute: bool = False) -> float:
    plan = plan_batch(LENGTHS, Layout(hdp=hdp, tp=tp, capacity=max(41, -(-97 // hdp))), COST)
    assert max(plan.ring_sizes()) == min(hdp, 3)
    return worst_error(recomputed(plan) if recompute else plan, dtype, MANY_HEADS, tp)


@pytest.mark.parametrize(
    ("hdp", "tp", "dtype"), [(1, 2, "float64"), (2, 2, "float32"), (3, 2, "float64"), (1, 4, "float32")]
)
def test_planned_gradients_equal_one_process_without_parallelism(hdp: int, tp: int, dtype: str) -> None:
    assert VOCABULARY % tp, "some vocabulary that does not divide"
    assert _error(hdp, tp, dtype) <= TOLERANCE[dtype]


@pytest.mark.parity
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize(("hdp", "tp"), [(1, 2), (2, 2), (3, 2), (4, 2), (1, 4), (2, 4), (3, 4)])
def test_gradients_on_the_wide_matrix(hdp: int, tp: int, dtype: str, recompute: bool) -> None:
    assert _error(hdp, tp, dtype, recompute=recompute) <= TOLERANCE[dtype]


def test_packs_odd_rings_fewer_tokens_than_ranks_and_recomputation() -> None:
    rings: list[Unit] = [[(0, (0, 1, 2)), (1, (0, 1, 2)), (2, (0,)), (3, (2,)), (4, (2,))], [(5, (2, 1))]]
    one_token: list[Unit] = [[(6, (1,))], [(7, (0,)), (8, (0,))]]
    plan = plan_by_hand((41, 19, 6, 1, 11, 23, 1, 5, 3), rings + one_token, ranks=3)
    assert worst_error(recomputed(plan), "float64", MODEL, tp=2) <= 1e-9


def test_ranks_without_tokens_and_a_share_without_tokens() -> None:
    # one token over two ranks: the ring has a member with nothing, and so have both ranks of its row
    plan = plan_by_hand((1, 2), [[(0, (0, 1))], [(1, (1,))]], ranks=2)
    assert {0, 1} == {micro_batches[0].num_tokens for micro_batches in plan.ranks}
    assert worst_error(plan, "float64", MODEL, tp=2) <= 1e-9
    idle = plan_by_hand((3,), [[(0, (1,))]], ranks=2)
    assert idle.ranks[0] == ()
    assert worst_error(idle, "float64", MODEL, tp=2) <= 1e-9
