"""The restated systems give right plans, and on small batches those that their papers' algorithms give by hand."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.parallelism import BatchPlan, CostModel, Layout, verify_plan
from evermesh.parallelism.batch_plan import Certificate
from evermesh.parallelism.errors import PlanInvalid, SequenceTooLong
from evermesh.parallelism.planner.restated import RESTATED
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.rank_work import Assignment
from tests.benchmarks.parallelism.baselines import megatron_phases, phases_s
from tests.parallelism.planner.aligned import align

COST = CostModel(token_s=1.0, pair_s=0.0, micro_batch_s=1.0)
Rank = list[tuple[list[int], int]]
"""Of every micro-batch: its sequences, and the size of its rings."""


def restated(name: str, lengths: tuple[int, ...], *, hdp: int = 4, cost: CostModel = COST) -> list[Rank]:
    """What each rank runs, with a capacity of 100 tokens."""
    assignment = RESTATED[name](lengths, Layout(hdp=hdp, capacity=100), cost, Pool.of(hdp))
    return [[([p.sequence for p in mb.pieces], len(mb.pieces[0].ring)) for mb in mbs] for mbs in assignment]


def plan_of(assignment: Assignment, lengths: tuple[int, ...], layout: Layout) -> BatchPlan:
    return BatchPlan(lengths, layout.capacity, assignment, Certificate(1.0, 0.0, "nothing"), "restated", 0, 0)


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(sorted(RESTATED)),
    lengths=st.lists(st.integers(1, 400) | st.integers(1, 30), max_size=30).map(tuple),
    hdp=st.sampled_from((4, 6, 8)),
    experts=st.booleans(),
)
def test_any_batch_gets_a_right_plan(name: str, lengths: tuple[int, ...], hdp: int, experts: bool) -> None:
    cost = CostModel(token_s=1.0, pair_s=0.05, micro_batch_s=1.0, ring_token_s=3.0, head_token_s=0.1)
    layout = Layout(hdp=hdp, capacity=100, ulysses=2, gathers_keys=True, ep=2 if experts else 1)
    assignment = RESTATED[name](lengths, layout, cost, Pool.of(hdp, 2))
    assert len(assignment) == hdp
    if experts:
        assignment = align(assignment, lengths, layout, cost)
    verify_plan(plan_of(assignment, lengths, layout), lengths, layout)


@pytest.mark.parametrize("name", sorted(RESTATED))
def test_a_sequence_that_all_ranks_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(SequenceTooLong, match="401"):
        restated(name, (5, 401))


def test_a_static_mesh_packs_and_deals_in_the_order_of_arrival() -> None:
    """150 tokens need two ranks, so 4 ranks are two groups; a micro-batch of a group holds 100 tokens per rank."""
    left, right = [([0], 2), ([3], 2)], [([1, 2], 2)]
    assert restated("static", (150, 100, 60, 120)) == [left, left, right, right]


def test_packing_gives_the_longest_to_the_group_with_least_work() -> None:
    """100 | 90, then 60 to the 90, then 50 to the 100; packed best-fit into 100 tokens."""
    assert restated("packed", (100, 90, 60, 50), hdp=2) == [[([0], 1), ([3], 1)], [([1], 1), ([2], 1)]]


def test_bytescale_1_takes_the_next_ranks_in_turn() -> None:
    """250 needs 3 ranks; 60 and 40 fill one; 90 and 70 start again at the first."""
    lengths = (60, 250, 40, 90, 70)
    long = ([1], 3)
    assert restated("bytescale-1", lengths) == [[long, ([4], 1)], [long, ([0, 2], 1)], [long], [([3], 1)]]


def test_bytescale_2_serves_the_ranks_with_the_shortest_times() -> None:
    """The long sequence takes 250 / 3 s on three ranks; the fourth runs 90 and is then behind; 70 goes to the first."""
    long = ([1], 3)
    assert restated("bytescale-2", (60, 250, 90, 70)) == [[long, ([3], 1)], [long, ([0], 1)], [long], [([2], 1)]]


def test_wlb_balances_work_and_falls_back_to_the_fewest_tokens() -> None:
    """Two micro-batches of 100: 80 | 60, then 30 to the one with less work, then 20 only fits beside 80."""
    assert restated("wlb", (80, 60, 30, 20), hdp=2) == [[([0, 3], 1)], [([1, 2], 1)]]


def test_wlb_runs_more_micro_batches_where_everything_does_not_fit() -> None:
    """190 tokens would fit two micro-batches, but three times 60 do not."""
    shares = restated("wlb", (60, 60, 60, 10), hdp=2)
    assert [sum(len(sequences) for sequences, _ in rank) for rank in shares] == [2, 2]
    assert sorted(len(rank) for rank in shares) in ([1, 2], [2, 2])


class _Scheduler:
    """Answers as Megatron Core's does: by group and rank, the sequences that run one after the other."""

    def __init__(self, capacity: int, ranks: Any) -> None:
        assert (capacity, ranks.size()) == (100, 3)

    def get_groups_and_subsamples(self, samples: list[tuple[int, int]], config: None) -> tuple[None, list]:
        return None, [[[0], [0], [2]], [[1], [3], [3]]]


def test_groups_of_megatron_core_run_one_after_the_other() -> None:
    """151 tokens on two ranks beside 60 on one take 75.5 + 1 s; then 40 beside 20 on two take 41 s."""
    lengths = (151, 40, 60, 20)
    phases = megatron_phases(_Scheduler, lengths, Layout(hdp=3, capacity=100), Pool.of(3))
    held = [[[(p.sequence, p.num_tokens) for mb in rank for p in mb.pieces] for rank in phase] for phase in phases]
    assert held == [[[(0, 76)], [(0, 75)], [(2, 60)]], [[(1, 40)], [(3, 10)], [(3, 10)]]]
    assert phases_s(phases, lengths, COST, Pool.of(3)) == 76.5 + 41


def test_groups_that_lose_a_sequence_or_exceed_memory_are_refused() -> None:
    layout, pool = Layout(hdp=3, capacity=100), Pool.of(3)
    with pytest.raises(PlanInvalid, match="1 of 5 sequences"):
        megatron_phases(_Scheduler, (150, 40, 60, 20, 7), layout, pool)
    with pytest.raises(PlanInvalid, match="2 ranks cannot hold"):
        megatron_phases(_Scheduler, (250, 40, 60, 20), layout, pool)
