"""The verifier refuses every kind of broken plan."""

import ast
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from evermesh.parallelism import (
    BatchPlan,
    Certificate,
    CostModel,
    Layout,
    MicroBatch,
    Piece,
    joint_order,
    plan_batch,
    proof,
    verifier,
    verify_plan,
)
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.pipeline import Action, PipelineSchedule
from evermesh.parallelism.simulator import simulate
from evermesh.parallelism.tiers import Tiers

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
    verify_plan(_plan(), LENGTHS, Layout(hdp=HDP, capacity=CAPACITY))


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_plan_is_refused(name: str) -> None:
    mutate, message = MUTATIONS[name]
    with pytest.raises(PlanInvalid, match=message):
        verify_plan(mutate(_plan()), LENGTHS, Layout(hdp=HDP, capacity=CAPACITY))


def test_micro_batch_over_the_capacity_is_refused() -> None:
    with pytest.raises(PlanInvalid, match="the capacity is 900"):
        verify_plan(_plan(), LENGTHS, Layout(hdp=HDP, capacity=900))


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
        verify_plan(_in_order(orders, recompute), (100, 100), Layout(hdp=2, capacity=200))


def test_rings_that_share_a_micro_batch_in_the_same_order_are_accepted() -> None:
    verify_plan(_in_order([[(0, 1)], [(0, 1)]]), (100, 100), Layout(hdp=2, capacity=200))


def test_the_simulator_refuses_a_circle_too() -> None:
    with pytest.raises(PlanInvalid, match="wait for each other in a circle"):
        simulate(_in_order([[(0,), (1,)], [(1,), (0,)]]), COST)


def test_verifier_shares_no_code_with_the_planner() -> None:
    """Only what a plan means: its form, the cost model, nodes and speeds, and the order of a pipeline."""
    folder = Path(inspect.getfile(proof)).parent
    sources = [inspect.getsource(module) for module in (verifier, joint_order)]
    sources += [file.read_text() for file in folder.glob("*.py")]
    assert len(sources) > 8
    imported = {
        node.module.removeprefix("evermesh.parallelism.")
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("evermesh")
    }
    meaning = {"batch_plan", "cost", "errors", "layout", "pipeline.schedule", "pool", "rank_work"}
    assert {name for name in imported if not name.startswith("proof.")} == meaning | {"joint_order"}


def _in_waves(layout: Layout) -> BatchPlan:
    """A plan with two crossing rings and packs beside them."""
    return plan_batch((2900, 2800, 1400, 1300, 1200, 900, 400, 300, 20), layout, COST)


WAVES = [
    Layout(hdp=HDP, capacity=CAPACITY, pp=2),
    Layout(hdp=HDP, capacity=CAPACITY, pp=2, activations="recompute"),
    Layout(hdp=HDP, capacity=CAPACITY, pp=3, schedule="zero-bubble"),
    Layout(hdp=HDP, capacity=CAPACITY, pp=2, schedule="interleaved-1f1b", virtual_stages=2, ep=2),
    Layout(hdp=HDP, capacity=CAPACITY, pp=2, schedule="zero-bubble-v", virtual_stages=2, ep=4),
    Layout(hdp=HDP, capacity=CAPACITY, ep=2),
    Layout(hdp=HDP, capacity=CAPACITY, tp=2, ep=4, etp=2),
    Layout(hdp=HDP, capacity=CAPACITY, sharding=Tiers(parameters=2, gradients=2, keep_for="micro_batch")),
]
waves = pytest.mark.parametrize("layout", WAVES, ids=str)


@waves
def test_plans_in_waves_are_accepted(layout: Layout) -> None:
    plan = _in_waves(layout)
    assert max(plan.ring_sizes()) > 1
    verify_plan(plan, plan.lengths, layout)


def _swapped(plan: BatchPlan, rank: int, first: int, second: int) -> BatchPlan:
    """The micro-batches of one rank at two indices, each in the place (and with the lock-step) of the other."""
    order = list(plan.ranks[rank])
    one, other = order[first], order[second]
    order[first] = dataclasses.replace(other, lock_step=one.lock_step)
    order[second] = dataclasses.replace(one, lock_step=other.lock_step)
    return _with_rank(plan, rank, order)


def _with_rank(plan: BatchPlan, rank: int, micro_batches: Sequence[MicroBatch]) -> BatchPlan:
    ranks = list(plan.ranks)
    ranks[rank] = tuple(micro_batches)
    return dataclasses.replace(plan, ranks=tuple(ranks))


def _ring_places(plan: BatchPlan) -> list[tuple[int, int]]:
    return [
        (rank, index)
        for rank, micro_batches in enumerate(plan.ranks)
        for index, micro_batch in enumerate(micro_batches)
        if any(len(piece.ring) > 1 for piece in micro_batch.pieces)
    ]


@waves
def test_a_ring_at_different_indices_is_refused(layout: Layout) -> None:
    plan = _in_waves(layout)
    rank, index = _ring_places(plan)[0]
    other = next(i for i in range(len(plan.ranks[rank])) if i != index)
    with pytest.raises(PlanInvalid, match=r"but in micro-batch \d+ of another member of its ring"):
        verify_plan(_swapped(plan, rank, index, other), plan.lengths, layout)


@pytest.mark.parametrize("layout", [layout for layout in WAVES if layout.lock_step_groups], ids=str)
def test_unequal_lock_steps_of_ranks_that_share_experts_are_refused(layout: Layout) -> None:
    plan = _in_waves(layout)
    extra = MicroBatch((), recompute=layout.recompute, lock_step=len(plan.ranks[0]))
    with pytest.raises(PlanInvalid, match="joins the lock-step collectives"):
        verify_plan(_with_rank(plan, 0, [*plan.ranks[0], extra]), plan.lengths, layout)
    unnumbered = [dataclasses.replace(micro_batch, lock_step=None) for micro_batch in plan.ranks[0]]
    with pytest.raises(PlanInvalid, match="which keep step, join 0 to"):
        verify_plan(_with_rank(plan, 0, unnumbered), plan.lengths, layout)


def _by_hand(layout: Layout, ranks: Sequence[Sequence[MicroBatch]], lengths: tuple[int, ...]) -> BatchPlan:
    return BatchPlan(
        lengths, layout.capacity, tuple(map(tuple, ranks)), Certificate(1.0, 1.0, "nothing"), "by hand", 0, 0
    )


def _whole(sequence: int, rank: int, lock_step: int | None = None, recompute: Any = "none") -> MicroBatch:
    return MicroBatch((Piece(sequence, ((0, 100),), (rank,)),), lock_step=lock_step, recompute=recompute)


def _share(sequence: int, rank: int) -> MicroBatch:
    return MicroBatch((Piece(sequence, share_of(100, 2, rank).ranges(), (0, 1)),))


def test_a_missing_zero_token_step_is_refused() -> None:
    experts = Layout(hdp=2, ep=2, capacity=200)
    idle = MicroBatch((), lock_step=1)
    ranks = [[_whole(0, 0, 0), _whole(1, 0, 1)], [_whole(2, 1, 0), idle]]
    verify_plan(_by_hand(experts, ranks, (100,) * 3), (100,) * 3, experts)
    with pytest.raises(PlanInvalid, match=r"rank 1 joins the lock-step collectives \[0\]"):
        verify_plan(_by_hand(experts, [ranks[0], ranks[1][:1]], (100,) * 3), (100,) * 3, experts)
    pipelines = Layout(hdp=2, pp=2, capacity=200)
    ranks = [[_whole(0, 0), _share(1, 0)], [MicroBatch(()), _share(1, 1)]]
    verify_plan(_by_hand(pipelines, ranks, (100,) * 2), (100,) * 2, pipelines)
    with pytest.raises(PlanInvalid, match="sequence 1 is in micro-batch 0 of rank 1, but in micro-batch 1"):
        verify_plan(_by_hand(pipelines, [ranks[0], ranks[1][1:]], (100,) * 2), (100,) * 2, pipelines)


def test_ranks_that_share_experts_choose_one_recomputation_for_each_lock_step() -> None:
    layout = Layout(hdp=2, ep=2, capacity=200)
    ranks = [[_whole(0, 0, 0, "block")], [_whole(1, 1, 0)]]
    with pytest.raises(PlanInvalid, match=r"\(0, 1\) disagree about recomputation in lock-step 0"):
        verify_plan(_by_hand(layout, ranks, (100, 100)), (100, 100), layout)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("pp", [2, 3])
def test_the_joint_order_refuses_crossed_rings_and_lock_steps_of_pipelines_too(schedule: Any, pp: int) -> None:
    crossed = _in_order([[(0,), (1,)], [(1,), (0,)]])
    pipelines = Layout(hdp=2, pp=pp, schedule=schedule, capacity=200)
    with pytest.raises(PlanInvalid, match="wait for each other for ever"):
        joint_order.check_order(crossed, pipelines)
    joint_order.check_order(_in_order([[(0,), (1,)], [(0,), (1,)]]), pipelines)
    experts = pipelines.model_copy(update={"ep": 2})
    steps = [[_whole(0, 0, 0), _whole(1, 0, 1)], [_whole(2, 1, 1), _whole(3, 1, 0)]]
    with pytest.raises(PlanInvalid, match="lock-step"):
        joint_order.check_order(_by_hand(experts, steps, (100,) * 4), experts)


def test_a_ring_out_of_step_with_its_experts_is_a_circle() -> None:
    """Rank 0 runs the ring in lock-step 0, rank 1 in lock-step 1: each waits for the other's experts or ring."""
    layout = Layout(hdp=2, ep=2, pp=2, capacity=200)
    ranks = [
        [dataclasses.replace(_share(0, 0), lock_step=0), MicroBatch((), lock_step=1)],
        [MicroBatch((), lock_step=0), dataclasses.replace(_share(0, 1), lock_step=1)],
    ]
    with pytest.raises(PlanInvalid, match="wait for each other for ever"):
        joint_order.check_order(_by_hand(layout, ranks, (100,)), layout)


def test_the_joint_order_refuses_stages_that_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 sends the second micro-batch when it has the first back; rank 1 begins with the second."""
    orders = {0: (0, 1), 1: (1, 0)}

    def crossed(_: PipelineSchedule, rank: int, num_micro_batches: int) -> tuple[Action, ...]:
        assert num_micro_batches == 2
        return tuple(Action(kind, rank, index) for index in orders[rank] for kind in ("forward", "backward"))

    layout = Layout(pp=2, capacity=200)
    plan = _by_hand(layout, [[_whole(0, 0), _whole(1, 0)]], (100, 100))
    monkeypatch.setattr(PipelineSchedule, "actions", crossed)
    with pytest.raises(PlanInvalid, match=r"wait for each other for ever, first at: .*Message"):
        verify_plan(plan, (100, 100), layout)
    orders[1] = (0, 1)
    verify_plan(plan, (100, 100), layout)


def test_pipelines_with_another_number_of_micro_batches_share_a_ring() -> None:
    for name, virtual_stages in (("1f1b", 1), ("interleaved-1f1b", 2), ("zero-bubble", 1), ("zero-bubble-v", 2)):
        layout = Layout.model_validate(
            {"hdp": 2, "pp": 3, "capacity": 200, "schedule": name, "virtual_stages": virtual_stages}
        )
        lengths = (100,) * 6
        ranks = [[_share(0, 0), *(_whole(i, 0) for i in range(1, 6))], [_share(0, 1)]]
        verify_plan(_by_hand(layout, ranks, lengths), lengths, layout)
