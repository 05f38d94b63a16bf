"""Plans in waves: nothing is lost, what runs together is at one index, nobody has steps that nobody needs."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.parallelism import BatchPlan, CostModel, Layout, MicroBatch, Piece, plan_batch, verify_plan
from evermesh.parallelism.errors import LayoutDoesNotFit, PlanInvalid
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.tiers import Tiers
from tests.parallelism.planner.aligned import align

COST = CostModel(token_s=1e-5, pair_s=2e-9, micro_batch_s=1e-3)
CAPACITY = 500
LAYOUTS = (
    {"pp": 2},
    {"pp": 3, "schedule": "zero-bubble", "activations": "recompute"},
    {"pp": 2, "schedule": "interleaved-1f1b", "virtual_stages": 2},
    {"ep": 2},
    {"ep": 2, "etp": 2, "activations": "recompute"},
    {"tp": 2, "ep": 2, "etp": 2, "pp": 2, "schedule": "zero-bubble-v", "virtual_stages": 2},
    {"sharding": {"parameters": 2, "gradients": 4, "keep_for": "micro_batch"}},
    {"pp": 2, "ep": 2, "sharding": {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"}},
)


def _contents(plan: BatchPlan) -> Counter[tuple[int, tuple[Piece, ...]]]:
    return Counter((rank, mb.pieces) for rank, mbs in enumerate(plan.ranks) for mb in mbs if mb.pieces)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 1900), max_size=24).map(tuple),
    choice=st.sampled_from(LAYOUTS),
    hdp=st.sampled_from((4, 8)),
)
def test_any_batch_gets_the_micro_batches_of_the_plain_plan_in_right_waves(
    lengths: tuple[int, ...], choice: dict[str, object], hdp: int
) -> None:
    layout = Layout.model_validate({"hdp": hdp, "capacity": CAPACITY, **choice})
    plan = plan_batch(lengths, layout, COST)
    verify_plan(plan, lengths, layout)
    plain = plan_batch(lengths, Layout(hdp=hdp, capacity=CAPACITY, activations=layout.activations), COST)
    assert _contents(plan) == _contents(plain)
    assert {mb.recompute for mbs in plan.ranks for mb in mbs} <= {layout.recompute}
    for rank, micro_batches in enumerate(plan.ranks):
        shares = any(rank in group for group in layout.lock_step_groups)
        in_ring = any(len(piece.ring) > 1 for mb in micro_batches for piece in mb.pieces)
        if not shares:
            assert not micro_batches or micro_batches[-1].pieces  # nothing empty behind the last
            assert in_ring or all(mb.pieces for mb in micro_batches)
    for group in layout.lock_step_groups:
        together = zip(*(plan.ranks[rank] for rank in group), strict=True)
        assert all(any(mb.pieces for mb in wave) for wave in list(together)[-1:])


def test_a_layout_without_pipelines_and_shared_experts_is_planned_as_ever() -> None:
    """The tensor-parallel ranks of one HDP rank may share experts among themselves."""
    lengths = (4000, 2500, 900, 400, 300, 20)
    plain = plan_batch(lengths, Layout(hdp=4, capacity=1500), COST)
    assert all(mb.pieces and mb.lock_step is None for mbs in plain.ranks for mb in mbs)
    assert plan_batch(lengths, Layout(hdp=4, capacity=1500, tp=2, ep=2), COST) == plain


def _packs(tokens: list[int], rank: int, first: int) -> tuple[MicroBatch, ...]:
    return tuple(MicroBatch((Piece(first + i, ((0, length),), (rank,)),)) for i, length in enumerate(tokens))


def test_waves_go_from_small_to_large_to_small() -> None:
    sizes = [10, 60, 20, 50, 30, 40]
    (order,) = align((_packs(sizes, 0, 0),), sizes, Layout(pp=2, capacity=100), COST)
    assert [micro_batch.num_tokens for micro_batch in order] == [10, 30, 50, 60, 40, 20]


def test_a_rank_in_a_ring_keeps_step_with_empty_micro_batches_and_one_without_does_not() -> None:
    lengths = (200, 10, 20, 300, 5)
    shares = [MicroBatch((Piece(0, ranges, (0, 1)),)) for ranges in (((0, 50), (150, 200)), ((50, 150),))]
    assignment = ((shares[0], *_packs([10, 20], 0, 1)), (shares[1],), _packs([300, 5], 2, 3))
    order = align(assignment, lengths, Layout(hdp=3, pp=2, capacity=300), COST)
    assert [[mb.num_tokens for mb in micro_batches] for micro_batches in order] == [[20, 100, 10], [0, 100], [5, 300]]


def test_rings_of_three_ranks_in_pairs_need_three_waves() -> None:
    pairs = ((0, 1), (1, 2), (0, 2))
    assignment: list[list[MicroBatch]] = [[], [], []]
    for sequence, pair in enumerate(pairs):
        for index, rank in enumerate(pair):
            assignment[rank].append(MicroBatch((Piece(sequence, share_of(100, 2, index).ranges(), pair),)))
    order = align(tuple(map(tuple, assignment)), (100,) * 3, Layout(hdp=3, pp=2, capacity=50), COST)
    places = {(p.sequence, rank): i for rank, mbs in enumerate(order) for i, mb in enumerate(mbs) for p in mb.pieces}
    assert places.keys() == {(sequence, rank) for sequence, pair in enumerate(pairs) for rank in pair}
    assert all(places[sequence, one] == places[sequence, other] for sequence, (one, other) in enumerate(pairs))
    assert len(set(places.values())) == 3


def test_one_recomputation_for_everyone_who_shares_experts_in_a_wave() -> None:
    one = MicroBatch((Piece(0, ((0, 50),), (0,)),), recompute="block")
    other = MicroBatch((Piece(1, ((0, 50),), (1,)),))
    order = align(((one,), (other,)), (50, 50), Layout(hdp=3, ep=3, capacity=100), COST)
    assert [[(mb.recompute, mb.lock_step) for mb in micro_batches] for micro_batches in order] == [[("block", 0)]] * 3


def test_two_micro_batches_of_one_rank_that_rings_join_fit_no_wave() -> None:
    def share(sequence: int, rank: int) -> Piece:
        return Piece(sequence, ((rank * 50, rank * 50 + 50),), (0, 1))

    assignment = (
        (MicroBatch((share(0, 0), share(1, 0))),),
        (MicroBatch((share(0, 1),)), MicroBatch((share(1, 1),))),
    )
    with pytest.raises(PlanInvalid, match="no wave can hold both"):
        align(assignment, (100, 100), Layout(hdp=2, pp=2, capacity=100), COST)


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        (Layout(hdp=4), ()),
        (Layout(hdp=4, tp=2, ep=2), ()),
        (Layout(hdp=4, ep=2), ((0, 1), (2, 3))),
        (Layout(hdp=4, tp=2, ep=2, etp=2), ((0, 1), (2, 3))),
        (Layout(hdp=4, tp=2, ep=8), ((0, 1, 2, 3),)),
        (Layout(hdp=3, tp=4, ep=6), ((0, 1, 2),)),
        (Layout(hdp=4, tp=3, ep=2), ((0, 1), (2, 3))),
        (Layout(hdp=4, sharding=Tiers(parameters=2, gradients=2)), ()),
        (Layout(hdp=4, sharding=Tiers(states=2, keep_for="micro_batch")), ()),
        (Layout(hdp=4, sharding=Tiers(parameters=2, gradients=2, keep_for="micro_batch")), ((0, 1), (2, 3))),
        (Layout(hdp=4, sharding=Tiers(gradients="all", keep_for="micro_batch")), ((0, 1, 2, 3),)),
        # edp 4: the experts are divided among neighbours along it, ranks 0 and 2, which are both halves of two models
        (Layout(hdp=4, tp=2, ep=2, sharding=Tiers(gradients=2, keep_for="micro_batch")), ((0, 1), (2, 3))),
        (Layout(hdp=8, ep=2, sharding=Tiers(gradients=2, keep_for="micro_batch")), ((0, 1, 2, 3), (4, 5, 6, 7))),
    ],
)
def test_hdp_ranks_that_communicate_in_every_micro_batch_keep_step(
    layout: Layout, groups: tuple[tuple[int, ...], ...]
) -> None:
    assert layout.lock_step_groups == groups


def test_experts_that_do_not_divide_the_ranks_of_a_stage_are_refused() -> None:
    with pytest.raises(
        LayoutDoesNotFit, match="ep 3 x etp 1 = 3 ranks that share experts do not divide the hdp 4 x tp 1 = 4 ranks"
    ):
        _ = Layout(hdp=4, ep=3).lock_step_groups


def test_a_layout_refuses_a_schedule_that_its_virtual_stages_do_not_have() -> None:
    with pytest.raises(ValueError, match="schedule 1f1b takes 1 virtual stages per rank, not 2"):
        Layout(pp=2, virtual_stages=2)


def test_virtual_stages_without_a_pipeline_are_refused_and_its_schedule_is_the_plain_one() -> None:
    with pytest.raises(ValueError, match="2 virtual stages per rank, but pp 1"):
        Layout(schedule="interleaved-1f1b", virtual_stages=2)
    order = Layout(schedule="gpipe").pipeline.actions(0, 2)
    assert [(action.kind, action.micro_batch) for action in order] == [
        ("forward", 0),
        ("backward", 0),
        ("forward", 1),
        ("backward", 1),
    ]
