"""The parts of the proof against what they say again in columns: the cut, the cost model, the simulators, the bound."""

import random

import numpy as np
import pytest

from evermesh.parallelism import plan_batch
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.pipeline.schedule import Action, PipelineSchedule
from evermesh.parallelism.pipeline.simulator import simulate_pipeline
from evermesh.parallelism.planner import lower_bound
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.proof.bound import valid_bound_s
from evermesh.parallelism.proof.columns import columns_of
from evermesh.parallelism.proof.durations import micro_batch_seconds
from evermesh.parallelism.proof.order import schedule_goes_on
from evermesh.parallelism.proof.packed import tokens_of_pieces
from evermesh.parallelism.proof.partners import partners
from evermesh.parallelism.proof.replay import replay_free_s, replay_waves_s
from evermesh.parallelism.rank_work import PackedRanks
from evermesh.parallelism.simulator import micro_batch_s, simulate
from tests.parallelism.planned import KINDS, Case, Kind, draw

kinds = pytest.mark.parametrize("kind", KINDS)


def _cases(kind: Kind, number: int = 12) -> list[Case]:
    return [draw(seed, kind, most_ranks=16) for seed in range(500, 500 + number)]


def _one_ring(length: int, ring: int) -> PackedRanks:
    members = np.random.default_rng(length).permutation(ring)
    return PackedRanks(
        lengths=np.array([length]),
        rank_start=np.arange(ring + 1),
        micro_batch_start=np.arange(ring + 1),
        sequence=np.zeros(ring, np.int64),
        ring_start=np.array([0, ring]),
        ring=members,
        heads=np.ones(1, np.int64),
        gathers=np.zeros(1, np.bool_),
        recomputed=np.zeros(ring, np.bool_),
        offload=np.zeros(ring),
    )


def test_tokens_of_columns_are_those_of_the_cut() -> None:
    case = draw(0)
    plan = case.plan()
    for length in range(1, 70):
        for ring in range(1, 13):
            packed = _one_ring(length, ring)
            object.__setattr__(plan, "ranks", packed)
            members = packed.ring.tolist()
            wanted = [share_of(length, ring, members.index(rank)).num_tokens for rank in range(ring)]
            assert tokens_of_pieces(columns_of(plan)).tolist() == wanted


@kinds
def test_columns_are_the_same_from_either_form_and_last_as_the_cost_model_says(kind: Kind) -> None:
    for case in _cases(kind):
        plan = case.plan()
        columns = columns_of(plan)
        object.__setattr__(plan, "ranks", tuple(plan.ranks))
        for name in columns.__dataclass_fields__:
            assert np.array_equal(getattr(columns, name), getattr(columns_of(plan), name)), name
        wanted = [
            micro_batch_s(micro_batch, plan.lengths, case.cost, case.pool) / case.pool.speeds[rank]
            for rank, micro_batches in enumerate(plan.ranks)
            for micro_batch in micro_batches
        ]
        np.testing.assert_allclose(micro_batch_seconds(columns, case.cost, case.pool), wanted, rtol=1e-12)


@kinds
def test_replay_is_what_the_simulator_says(kind: Kind) -> None:
    """On ranks that are alike, in one node: the simulators of plans know no others."""
    for case in _cases(kind):
        pool = Pool.of(case.layout.hdp)
        plan = plan_batch(case.lengths, case.layout, case.cost, pool=pool)
        columns = columns_of(plan)
        seconds = micro_batch_seconds(columns, case.cost, pool)
        if kind == "free":
            found, wanted = replay_free_s(columns, seconds), simulate(plan, case.cost).makespan_s
        else:
            found = replay_waves_s(columns, seconds, case.layout)
            wanted = simulate_pipeline(plan, case.layout, case.cost).makespan_s
        assert found == pytest.approx(wanted, rel=1e-12)


def test_the_verifiers_bound_is_never_above_that_of_the_planner() -> None:
    close = 0
    for seed in range(400):
        case = draw(seed, "free")
        own = valid_bound_s(np.asarray(case.lengths, np.int64), case.layout, case.cost, case.pool)
        bound = lower_bound(case.lengths, case.layout, case.cost, case.pool).seconds
        assert own <= bound * (1 + 1e-11), case
        close += own > 0.99 * bound
    assert close > 100


def test_partners_are_counted_as_by_hand() -> None:
    rings = [((0, 1, 2, 3), 1), ((0, 1, 2, 3), 2), ((0, 4), 1), ((1, 2), 2)]
    members = np.array([rank for ring, _ in rings for rank in ring])
    packed = PackedRanks(
        lengths=np.full(4, 100),
        rank_start=np.arange(6),
        micro_batch_start=np.array([0, 3, 6, 9, 11, 12]),
        sequence=np.array([0, 1, 2, 0, 1, 3, 0, 1, 3, 0, 1, 2]),
        ring_start=np.array([0, 4, 8, 10, 12]),
        ring=members,
        heads=np.array([heads for _, heads in rings]),
        gathers=np.zeros(4, np.bool_),
        recomputed=np.zeros(5, np.bool_),
        offload=np.zeros(5),
    )
    plan = draw(0).plan()
    object.__setattr__(plan, "ranks", packed)
    # 0 meets 1 and 3 in the first ring, 2 in the second, 4 in the third; the fourth passes nothing around
    assert partners(columns_of(plan)).tolist() == [4, 3, 3, 3, 1]


SCHEDULES = (
    PipelineSchedule("gpipe", 3),
    PipelineSchedule("1f1b", 4),
    PipelineSchedule("interleaved-1f1b", 2, 3),
    PipelineSchedule("zero-bubble", 4),
    PipelineSchedule("zero-bubble-v", 3, 2),
)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_schedules_go_on_for_any_numbers_of_micro_batches(schedule: PipelineSchedule) -> None:
    assert schedule_goes_on(schedule, range(12))


def test_schedules_that_shorter_pipelines_do_not_follow_or_that_wait_for_ever_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def backwards(_: PipelineSchedule, rank: int, number: int) -> tuple[Action, ...]:
        order = range(number) if number % 2 else reversed(range(number))
        return tuple(Action(kind, rank, index) for index in order for kind in ("forward", "backward"))

    def crossed(_: PipelineSchedule, rank: int, number: int) -> tuple[Action, ...]:
        order = range(number) if rank else reversed(range(number))
        return tuple(Action(kind, rank, index) for index in order for kind in ("forward", "backward"))

    monkeypatch.setattr(PipelineSchedule, "actions", backwards)
    assert schedule_goes_on(PipelineSchedule("1f1b", 2), [3])
    assert not schedule_goes_on(PipelineSchedule("1f1b", 2), [2, 3])
    monkeypatch.setattr(PipelineSchedule, "actions", crossed)
    assert not schedule_goes_on(PipelineSchedule("1f1b", 2), [2])


def test_draws_are_the_same_for_the_same_seed() -> None:
    assert draw(random.Random(1).randrange(100)) == draw(random.Random(1).randrange(100))
