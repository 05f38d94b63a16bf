"""Short steps get plans without a long search; what a plan is depends on what its step takes, never on a clock."""

import random
import time

import pytest

from evermesh.parallelism import CostModel, Layout, plan_batch, verify_plan
from evermesh.parallelism.planner.effort import effort_of

COST = CostModel(token_s=2e-6, pair_s=2e-10, micro_batch_s=1e-3, piece_s=4e-5, ring_step_s=1e-4, ring_token_s=1e-7)
LAYOUTS = {
    "rings": Layout(hdp=4, capacity=1024),
    "lock-step": Layout(hdp=4, capacity=1024, ep=2),
    "pipelines": Layout(hdp=2, capacity=1024, pp=2),
}


def _batch(seed: int, count: int) -> list[int]:
    draw = random.Random(seed)
    return [min(2000, int(draw.lognormvariate(5.5, 1)) + 2) for _ in range(count)]


def _slower(factor: float) -> CostModel:
    """Everything takes so many times as long."""
    return CostModel(
        **{name: value * factor for name, value in COST.model_dump(exclude_unset=True).items() if name.endswith("_s")}
    )


def test_the_effort_grows_with_the_step_from_nothing_to_all() -> None:
    efforts = [effort_of(seconds) for seconds in (0.0, 0.015, 0.1, 0.5, 2.0, 60.0)]
    assert efforts == sorted(efforts)
    assert efforts[:2] == [0.0, 0.0]
    assert efforts[-2:] == [1.0, 1.0]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_short_step_gets_the_plan_without_a_search_and_a_long_one_that_of_the_full_search(kind: str) -> None:
    layout, slow, totals = LAYOUTS[kind], _slower(1000), [0.0, 0.0]
    for seed in range(6):
        lengths = _batch(seed, 9)
        plan = plan_batch(lengths, layout, COST)
        assert plan.certificate.makespan_s < 0.02
        assert plan == plan_batch(lengths, layout, COST, effort=0.0)
        verify_plan(plan, lengths, layout, cost=COST)
        searched = plan_batch(lengths, layout, slow)
        assert searched == plan_batch(lengths, layout, slow, effort=1.0)
        verify_plan(searched, lengths, layout, cost=slow)
        totals[0] += 1000 * plan.certificate.makespan_s
        totals[1] += searched.certificate.makespan_s
    assert totals[1] < (1.02 if kind == "pipelines" else 0.999) * totals[0]  # pipelines are searched anyway


@pytest.mark.parametrize("kind", ["rings", "lock-step"])  # pipelines, always searched, take some 10 ms
def test_a_plan_is_made_in_less_than_the_step_it_is_for(kind: str) -> None:
    """In processor time of the planning thread, whoever else computes; the best of some plans, as the first loads."""
    layout, lengths = LAYOUTS[kind], _batch(0, 100)
    taken = []
    for _ in range(5):
        began = time.thread_time()
        plan = plan_batch(lengths, layout, COST)
        taken.append(time.thread_time() - began)
    assert plan.certificate.makespan_s < 0.15
    assert min(taken) < plan.certificate.makespan_s / 2
