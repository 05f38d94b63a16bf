"""Plans of ranks that keep step are right, never beat their bound, and come close to the best plan there is."""

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.parallelism import BatchPlan, CostModel, Layout, verify_plan
from evermesh.parallelism.batch_plan import Certificate, MicroBatch, Piece
from evermesh.parallelism.errors import SequenceTooLong
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.planner.lock_step import lock_step_bound, plan_lock_step
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.rank_work import Assignment
from tests.parallelism.planner.steps import lock_step_s

ZERO_3 = {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"}
CAPACITY = 500
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"ep": 2},
    {"ep": 4, "ulysses": 2, "gathers_keys": True},
    {"tp": 2, "ep": 2, "etp": 2},
    {"sharding": ZERO_3},
    {"sharding": ZERO_3, "activations": "recompute", "keep_capacity": 200, "ulysses": 4},
    {"sharding": {"parameters": 2, "gradients": 4, "keep_for": "micro_batch"}, "activations": "recompute"},
)
COST = CostModel(
    token_s=1e-5,
    pair_s=2e-8,
    micro_batch_s=1e-3,
    piece_s=1e-5,
    recompute_token_s=3e-6,
    ring_step_s=1e-5,
    ring_token_s=1e-5,
    network_token_s=4e-5,
    head_token_s=1e-6,
)


def planned(lengths: Sequence[int], layout: Layout, pool: Pool, cost: CostModel = COST) -> tuple[BatchPlan, float]:
    """A plan that the verifier accepts, with a certificate from replaying it, and its seconds."""
    assignment = plan_lock_step(lengths, layout, cost, pool)
    seconds = lock_step_s(assignment, lengths, layout, cost, pool)
    bound = lock_step_bound(lengths, layout, cost, pool)
    certificate = Certificate(seconds, bound.seconds, bound.binding)
    plan = BatchPlan(tuple(lengths), layout.capacity, assignment, certificate, "lock-step", 0, 0)
    verify_plan(plan, lengths, layout)
    return plan, seconds


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 3500) | st.integers(1, 200), max_size=30).map(tuple),
    choice=st.sampled_from(LAYOUTS),
    node=st.sampled_from((None, 4, 3)),
    slow=st.sampled_from(((), (1.0,) * 6 + (0.5, 1.0), tuple(0.8 + 0.05 * i for i in range(8)))),
)
def test_any_batch_gets_a_right_plan_that_is_no_faster_than_its_bound(
    lengths: tuple[int, ...], choice: dict[str, Any], node: int | None, slow: tuple[float, ...]
) -> None:
    layout = Layout.model_validate({"hdp": 8, "capacity": CAPACITY, **choice})
    plan, _ = planned(lengths, layout, Pool.of(8, node, slow))
    assert plan.certificate.makespan_s >= plan.certificate.lower_bound_s * (1 - 1e-9)
    if layout.recompute == "none":
        assert {mb.recompute for mbs in plan.ranks for mb in mbs} <= {"none"}


def test_a_sequence_that_all_ranks_cannot_hold_is_refused() -> None:
    layout, pool = Layout(hdp=4, capacity=100, ep=2), Pool.of(4)
    for planner in (plan_lock_step, lock_step_bound):
        with pytest.raises(SequenceTooLong, match="401"):
            planner((7, 401), layout, COST, pool)


def test_groups_run_waves_of_their_own() -> None:
    """One group runs the long sequence in one wave, the other meanwhile all others in several."""
    cost = CostModel(token_s=1e-5, pair_s=1e-7, micro_batch_s=1e-6, network_token_s=1.0)
    layout = Layout(hdp=4, capacity=1000, ep=2)
    plan, seconds = planned((2000, *(500,) * 12), layout, Pool.of(4, 2), cost)
    assert sorted(len(plan.ranks[rank]) for rank in (0, 2)) == [1, 3]
    assert seconds < 1.05 * cost.ring_s(2000, 2)


def test_light_waves_keep_their_activations() -> None:
    layout = Layout.model_validate(
        {"hdp": 4, "capacity": 400, "keep_capacity": 100, "activations": "recompute", "sharding": ZERO_3}
    )
    lengths = (*(400,) * 4, *(50,) * 4)
    cost = COST.model_copy(update={"ring_step_s": 1.0})
    plan, _ = planned(lengths, layout, Pool.of(4), cost)
    for wave in zip(*plan.ranks, strict=True):
        heaviest = max(micro_batch.num_tokens for micro_batch in wave)
        assert {micro_batch.recompute for micro_batch in wave} == {"block" if heaviest > 100 else "none"}


def test_a_slow_rank_gets_what_it_finishes_in_time() -> None:
    """A rank at half speed would double every wave; with less to do it costs no more than its share."""
    layout = Layout.model_validate({"hdp": 8, "capacity": 4000, "sharding": ZERO_3})
    lengths = [97 + 13 * (i % 29) for i in range(200)]
    _, even = planned(lengths, layout, Pool.of(8))
    _, seconds = planned(lengths, layout, Pool.of(8, None, (*(1.0,) * 7, 0.5)))
    assert seconds <= 1.03 * even * 8 / 7.5


def test_large_batches_come_close_to_the_bound() -> None:
    lengths = [int(20 * 1.0137**i) for i in range(360)]
    for layout in (
        Layout(hdp=16, capacity=2000, ep=4),
        Layout.model_validate({"hdp": 16, "capacity": 2000, "sharding": ZERO_3}),
    ):
        plan, _ = planned(lengths, layout, Pool.of(16))
        assert plan.certificate.ratio < 1.03


_TINY = [
    ((90, 60, 30), Layout(hdp=2, capacity=60, ep=2)),
    ((100, 40, 40), Layout(hdp=2, capacity=100, ep=2)),
    ((250, 30, 20), Layout(hdp=3, capacity=100, ep=3)),
    ((100, 100, 50), Layout(hdp=3, capacity=60, ep=3)),
    ((170, 90), Layout(hdp=4, capacity=60, ep=2)),
    ((119, 110), Layout(hdp=4, capacity=60, ep=2)),
]


@pytest.mark.parametrize(("lengths", "layout"), _TINY)
@pytest.mark.parametrize("pair_s", [0.0, 1e-3])
def test_the_bound_holds_for_the_best_of_all_plans_and_the_planner_is_near_it(
    lengths: tuple[int, ...], layout: Layout, pair_s: float
) -> None:
    cost = CostModel(token_s=0.01, pair_s=pair_s, micro_batch_s=0.2, ring_token_s=0.015, ring_step_s=0.01)
    pool = Pool.of(layout.hdp)
    best = min(lock_step_s(one, lengths, layout, cost, pool) for one in _all_plans(lengths, layout))
    _, seconds = planned(lengths, layout, pool, cost)
    assert lock_step_bound(lengths, layout, cost, pool).seconds <= best * (1 + 1e-9)
    assert best * (1 - 1e-9) <= seconds <= 1.25 * best


def _all_plans(lengths: Sequence[int], layout: Layout) -> Iterator[Assignment]:
    """Every choice of ranks and of one of as many waves as there are sequences, where memory suffices."""
    ranks, waves = range(layout.hdp), range(len(lengths))
    rings = [ring for size in ranks for ring in itertools.combinations(ranks, size + 1)]
    for chosen in itertools.product(itertools.product(rings, waves), repeat=len(lengths)):
        held = [[[] for _ in waves] for _ in ranks]  # type: list[list[list[Piece]]]
        for sequence, (ring, wave) in enumerate(chosen):
            for index, rank in enumerate(ring):
                ranges = share_of(lengths[sequence], len(ring), index).ranges()
                held[rank][wave].append(Piece(sequence, ranges, ring))
        if all(sum(p.num_tokens for p in pieces) <= layout.capacity for of_rank in held for pieces in of_rank):
            yield tuple(_numbered(rank, held, layout) for rank in ranks)


def _numbered(rank: int, held: list[list[list[Piece]]], layout: Layout) -> tuple[MicroBatch, ...]:
    """Up to the last wave in which anyone of the group has something."""
    group = next(group for group in layout.lock_step_groups if rank in group)
    last = max((wave + 1 for member in group for wave, pieces in enumerate(held[member]) if pieces), default=0)
    return tuple(MicroBatch(tuple(pieces), lock_step=wave) for wave, pieces in enumerate(held[rank][:last]))


def digest() -> str:
    """Of plans that use every part of the loops."""
    lengths = [7 + (i * i * 37) % 611 for i in range(70)] + [2600, 1900]
    plans = [
        plan_lock_step(
            lengths, Layout.model_validate({"hdp": 8, "capacity": CAPACITY, **choice}), COST, Pool.of(8, 4, slow)
        )
        for choice, slow in (*((choice, ()) for choice in LAYOUTS), (LAYOUTS[0], (1.0,) * 7 + (0.5,)))
    ]
    return hashlib.sha256(repr(plans).encode()).hexdigest()


def test_plain_python_and_other_hash_seeds_give_the_same_plans() -> None:
    program = "from tests.parallelism.planner.test_lock_step import digest; print(digest())"
    environment = {**os.environ, "EVERMESH_PLANNER": "python", "PYTHONHASHSEED": "7"}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=150, check=True
    )
    assert found.stdout.strip() == digest()
