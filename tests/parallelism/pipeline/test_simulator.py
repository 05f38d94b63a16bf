"""Simulated pipelines against the closed form, a simulation that steps through time, and the bound of a plan."""

import itertools
import random

import pytest

from evermesh.parallelism import CostModel, Layout, plan_batch
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.pipeline import Action, Message, PipelineSchedule
from evermesh.parallelism.pipeline.simulator import StageSeconds, replay, run_together, simulate_pipeline
from evermesh.parallelism.simulator import simulate
from tests.parallelism.pipeline.test_schedule import SCHEDULES

EQUAL = StageSeconds(1.0, 1.0, 1.0)
COST = CostModel(token_s=1e-5, pair_s=2e-9, micro_batch_s=1e-3)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("number", [1, 2, 7, 24])
def test_equal_micro_batches_take_what_the_closed_form_says(ranks: int, number: int) -> None:
    """(p - 1 + m)(t_f + t_b): Narayanan et al., arXiv 2104.04473, section 2.2."""
    seconds = [[[StageSeconds(1.5, 2.0, 0.5)] * ranks] * number]
    for name in ("1f1b", "gpipe"):
        schedule = PipelineSchedule("1f1b" if name == "1f1b" else "gpipe", ranks)
        assert replay(schedule, seconds).makespan_s == pytest.approx((ranks - 1 + number) * 4.0)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_bubbles_are_as_small_as_the_papers_say(ranks: int) -> None:
    """Interleaving divides the bubble by v (Narayanan et al.); ZB-H1 leaves a third, ZB-V none (Qi et al., table 2)."""

    def bubble(schedule: PipelineSchedule) -> float:
        number = 4 * ranks
        seconds = [[[StageSeconds(*(part / schedule.virtual_stages for part in EQUAL))] * schedule.num_stages] * number]
        timeline = replay(schedule, seconds)
        starts: dict[int, list[tuple[float, float]]] = {}
        for span in timeline.spans:
            starts.setdefault(span.pipeline_rank, []).append((span.start_s, span.stop_s))
        # without the optimizer's barrier: the longest time from the first to the last action of a rank, less its work
        return max(max(stop for _, stop in of) - min(start for start, _ in of) for of in starts.values()) - 3.0 * number

    assert bubble(PipelineSchedule("1f1b", ranks)) == pytest.approx(3.0 * (ranks - 1))
    assert bubble(PipelineSchedule("interleaved-1f1b", ranks, 2)) == pytest.approx(1.5 * (ranks - 1))
    assert bubble(PipelineSchedule("zero-bubble", ranks)) == pytest.approx(1.0 * (ranks - 1))
    assert bubble(PipelineSchedule("zero-bubble-v", ranks, 2)) == pytest.approx(0.0, abs=1e-9)


def _by_steps(
    schedule: PipelineSchedule, seconds: list[list[list[StageSeconds]]], groups: list[list[set[int]]]
) -> float:
    """The same by stepping through whole seconds: what can start in this second does."""
    places = list(itertools.product(range(schedule.ranks), range(len(seconds))))
    waiting = {(q, r): list(schedule.actions(q, len(seconds[r]))) for q, r in places}
    busy_until = dict.fromkeys(places, 0)
    there: dict[tuple[Message, int], int] = {}

    def can_start(place: tuple[int, int], action: Action, now: int) -> bool:
        message = schedule.received(action)
        return (
            bool(waiting[place])
            and waiting[place][0] == action
            and busy_until[place] <= now
            and (message is None or there.get((message, place[1]), now + 1) <= now)
        )

    for now in range(100_000):
        if not any(waiting.values()):
            return max(busy_until.values())
        for q, r in places:
            if not waiting[q, r]:
                continue
            action = waiting[q, r][0]
            gang = {r}
            if action.kind != "backward weight":
                gang = next((group for group in groups[action.micro_batch] if r in group), gang)
            if all(can_start((q, member), action, now) for member in gang):
                stop = now + int(max(seconds[m][action.micro_batch][action.stage].of(action.kind) for m in gang))
                for member in gang:
                    waiting[q, member].pop(0)
                    busy_until[q, member] = stop
                    if (message := schedule.sent(action)) is not None:
                        there[message, member] = stop
    raise AssertionError("stuck")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.name}-{s.ranks}x{s.virtual_stages}")
def test_unequal_pipelines_joined_at_some_indices_end_when_stepping_through_time_says(
    schedule: PipelineSchedule,
) -> None:
    generator = random.Random(repr(schedule))
    for _ in range(6):
        counts = [generator.randint(0, 6) for _ in range(3)]
        seconds = [
            [
                [StageSeconds(*(generator.randint(1, 5) for _ in range(3))) for _ in range(schedule.num_stages)]
                for _ in range(count)
            ]
            for count in counts
        ]
        groups: list[list[set[int]]] = []
        for index in range(max(counts)):
            present = [rank for rank, count in enumerate(counts) if index < count]
            members = set(generator.sample(present, generator.randint(1, len(present))))
            groups.append([members] if len(members) > 1 else [])
        together = {
            (rank, index): tuple(sorted(group)) for index, sets in enumerate(groups) for group in sets for rank in group
        }
        assert replay(schedule, seconds, together).makespan_s == _by_steps(schedule, seconds, groups)


def test_pipelines_that_wait_for_each_other_are_refused() -> None:
    with pytest.raises(PlanInvalid, match="wait for each other in a circle"):
        replay(PipelineSchedule(), [[[EQUAL]], [[EQUAL]] * 0], {(0, 0): (0, 1)})


def test_rings_and_experts_join_ranks_through_others() -> None:
    layout = Layout(hdp=4, ep=2, capacity=1000)
    plan = plan_batch((1900, 900, 800), layout, COST)
    (ring,) = {p.ring for mbs in plan.ranks for mb in mbs for p in mb.pieces if len(p.ring) > 1}
    wave = next(i for i, mb in enumerate(plan.ranks[ring[0]]) for p in mb.pieces if p.ring == ring)
    together = run_together(plan.ranks, layout)
    expected = {rank for group in ((0, 1), (2, 3)) if set(group) & set(ring) for rank in group}
    assert set(together[ring[0], wave]) == expected


@pytest.mark.parametrize(
    "layout",
    [
        Layout(hdp=4, capacity=1500, pp=2),
        Layout(hdp=4, capacity=1500, pp=4, activations="recompute"),
        Layout(hdp=2, capacity=2000, pp=4, schedule="zero-bubble"),
        Layout(hdp=3, capacity=1500, pp=2, schedule="zero-bubble-v", virtual_stages=2),
        Layout(hdp=4, capacity=1500, pp=2, schedule="interleaved-1f1b", virtual_stages=3, ep=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [(4000, 2500, 900, 400, 300, 20), (1400,), (10,) * 5, (1000, 999) * 20])
def test_no_simulated_plan_beats_its_bound(layout: Layout, lengths: tuple[int, ...]) -> None:
    plan = plan_batch(lengths, layout, COST)
    timeline = simulate_pipeline(plan, layout, COST)
    assert plan.certificate.makespan_s == pytest.approx(timeline.makespan_s, rel=1e-9)
    assert timeline.makespan_s >= plan.certificate.lower_bound_s * (1 - 1e-12)


def test_a_pipeline_of_one_rank_is_what_the_simulator_of_plans_says() -> None:
    layout = Layout(hdp=4, capacity=1500)
    plan = plan_batch((2900, 2800, 1400, 1300, 1200, 900, 400), Layout(hdp=4, capacity=1500, ep=4), COST)
    plain = simulate(plan, COST).makespan_s
    assert simulate_pipeline(plan, layout, COST).makespan_s == pytest.approx(plain)
