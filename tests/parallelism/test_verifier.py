"""The verifier refuses every kind of broken plan."""

import ast
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from evermesh.parallelism import BatchPlan, Certificate, CostModel, Layout, MicroBatch, Piece, plan_batch, verify_plan
from evermesh.parallelism import verifier as verifier_module
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.simulator import simulate

COST = CostModel(token_s=1e-5, pair_s=2e-9, micro_batch_s=1e-3)
LENGTHS = (4000, 2500, 900, 400, 300, 20)
CAPACITY, HDP = 1500, 4


def _plan() -> BatchPlan:
    return plan_batch(LENGTHS, Layout(hdp=HDP, capacity=CAPACITY), COST)


def _with_piece(
    plan: BatchPlan, sequence: int, change: Callable[[Piece], Piece | None], *, rank: int | None = None
) -> BatchPlan:
    """The plan with the pieces of one sequence changed (on one rank, or the lowest that holds it)."""
    holders = [r for r, mbs in enumerate(plan.ranks) for mb in mbs for piece in mb.pieces if piece.sequence == sequence]
    at = holders[0] if rank is None else rank

    def changed(micro_batch: MicroBatch) -> MicroBatch:
        pieces = [change(piece) if piece.sequence == sequence else piece for piece in micro_batch.pieces]
        return dataclasses.replace(micro_batch, pieces=tuple(piece for piece in pieces if piece is not None))

    ranks = [tuple(changed(mb) for mb in mbs) if r == at else mbs for r, mbs in enumerate(plan.ranks)]
    return dataclasses.replace(plan, ranks=tuple(ranks))


def _edit(piece: Piece, **changes: Any) -> Piece:
    return dataclasses.replace(piece, **changes)


def _shifted(piece: Piece) -> Piece:
    return _edit(piece, ranges=tuple((start + 1, stop + 1) for start, stop in piece.ranges))


def _shorter(piece: Piece) -> Piece:
    *rest, (start, stop) = piece.ranges
    return _edit(piece, ranges=(*rest, (start, stop - 1)))


def _on_other_rank(plan: BatchPlan) -> BatchPlan:
    """The whole sequence 5 is run by a rank that its piece does not name."""
    holder = next(r for r, mbs in enumerate(plan.ranks) for mb in mbs for p in mb.pieces if p.sequence == 5)
    piece = Piece(5, ((0, 20),), (holder,))
    without = _with_piece(plan, 5, lambda _: None)
    other = (holder + 1) % HDP
    ranks = list(without.ranks)
    ranks[other] = (*ranks[other], MicroBatch((piece,)))
    return dataclasses.replace(without, ranks=tuple(ranks))


def _twice(plan: BatchPlan) -> BatchPlan:
    ranks = list(plan.ranks)
    ranks[0] = (*ranks[0], ranks[0][0])
    return dataclasses.replace(plan, ranks=tuple(ranks))


def _unbalanced(plan: BatchPlan) -> BatchPlan:
    """Sequence 0 in plain blocks: every token once, but the last ranks see most of the pairs."""
    ring = next(piece.ring for mb in plan.ranks[0] for piece in mb.pieces if piece.sequence == 0)
    cuts = [LENGTHS[0] * index // len(ring) for index in range(len(ring) + 1)]
    for rank, block in zip(ring, itertools.pairwise(cuts), strict=True):
        plan = _with_piece(plan, 0, functools.partial(_edit, ranges=(block,)), rank=rank)
    return plan


def _lock_steps(plan: BatchPlan, rank: int) -> BatchPlan:
    ranks = list(plan.ranks)
    ranks[rank] = tuple(dataclasses.replace(mb, lock_step=index) for index, mb in enumerate(ranks[rank]))
    return dataclasses.replace(plan, ranks=tuple(ranks))


def _recompute_on_one_rank(plan: BatchPlan) -> BatchPlan:
    ranks = list(plan.ranks)
    ranks[1] = tuple(dataclasses.replace(mb, recompute="block") for mb in ranks[1])
    return dataclasses.replace(plan, ranks=tuple(ranks))


MUTATIONS: dict[str, tuple[Callable[[BatchPlan], BatchPlan], str]] = {
    "a token left out": (lambda plan: _with_piece(plan, 3, _shorter), "has 400 tokens, but the plan holds 399"),
    "a gap in the middle": (lambda plan: _with_piece(plan, 0, _shorter, rank=1), "nobody holds tokens"),
    "a token held twice": (lambda plan: _with_piece(plan, 0, _shifted), "tokens from"),
    "a sequence nobody holds": (lambda plan: _with_piece(plan, 5, lambda _: None), "the plan holds 0"),
    "a sequence that is not there": (
        lambda plan: _with_piece(plan, 5, lambda p: _edit(p, sequence=9)),
        "does not have",
    ),
    "an empty range": (
        lambda plan: _with_piece(plan, 5, lambda p: _edit(p, ranges=((0, 0), (0, 20)))),
        "the empty range",
    ),
    "members that disagree": (
        lambda plan: _with_piece(plan, 0, lambda p: _edit(p, ring=p.ring[::-1])),
        "disagree about the ring",
    ),
    "a ring without its holder": (_on_other_rank, "names the ring"),
    "a micro-batch run twice": (_twice, "holds two pieces"),
    "plain blocks instead of a balanced cut": (_unbalanced, "is unbalanced"),
    "recomputation on one member only": (_recompute_on_one_rank, "disagrees about recomputation"),
    "lock-step collectives on one rank only": (lambda plan: _lock_steps(plan, 2), "lock-step collectives"),
    "a rank too many": (lambda plan: dataclasses.replace(plan, ranks=(*plan.ranks, ())), "for 5 ranks"),
    "other lengths": (lambda plan: dataclasses.replace(plan, lengths=LENGTHS[:-1]), "of other lengths"),
    "a promise below the bound": (
        lambda plan: dataclasses.replace(plan, certificate=Certificate(1.0, 2.0, "work")),
        "promises",
    ),
}


def test_the_plan_itself_is_accepted() -> None:
    verify_plan(_plan(), LENGTHS, hdp=HDP, capacity=CAPACITY)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_plan_is_refused(name: str) -> None:
    mutate, message = MUTATIONS[name]
    with pytest.raises(PlanInvalid, match=message):
        verify_plan(mutate(_plan()), LENGTHS, hdp=HDP, capacity=CAPACITY)


def test_micro_batch_over_the_capacity_is_refused() -> None:
    with pytest.raises(PlanInvalid, match="the capacity is 900"):
        verify_plan(_plan(), LENGTHS, hdp=HDP, capacity=900)


def _in_order(orders: list[list[tuple[int, ...]]], recompute: bool = False) -> BatchPlan:
    """Sequences 0 and 1, 100 tokens each, over two ranks; every item of an order is one micro-batch."""
    ranks = tuple(
        tuple(
            MicroBatch(
                tuple(Piece(i, share_of(100, 2, rank).ranges(), (0, 1)) for i in unit),
                recompute="block" if recompute else "none",
            )
            for unit in order
        )
        for rank, order in enumerate(orders)
    )
    return BatchPlan((100, 100), 200, ranks, Certificate(1.0, 1.0, "nothing"), "by hand", 0, 0)


@pytest.mark.parametrize(
    "orders",
    [
        [[(0,), (1,)], [(1,), (0,)]],  # crossed
        [[(0, 1)], [(0,), (1,)]],  # one rank needs the backward of 0 before the forward of 1
        [[(0, 1)], [(1, 0)]],  # the same micro-batch, its rings in another order
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_ranks_that_would_wait_for_each_other_are_refused(orders: list[list[tuple[int, ...]]], recompute: bool) -> None:
    with pytest.raises(PlanInvalid, match="wait for each other for ever"):
        verify_plan(_in_order(orders, recompute), (100, 100), hdp=2, capacity=200)


def test_rings_that_share_a_micro_batch_in_the_same_order_are_accepted() -> None:
    verify_plan(_in_order([[(0, 1)], [(0, 1)]]), (100, 100), hdp=2, capacity=200)


def test_the_simulator_refuses_a_circle_too() -> None:
    with pytest.raises(PlanInvalid, match="wait for each other in a circle"):
        simulate(_in_order([[(0,), (1,)], [(1,), (0,)]]), COST)


def test_verifier_shares_no_code_with_the_planner() -> None:
    tree = ast.parse(inspect.getsource(verifier_module))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {module for module in imported if module and module.startswith("evermesh")}
    assert ours == {"evermesh.parallelism.batch_plan", "evermesh.parallelism.errors"}
