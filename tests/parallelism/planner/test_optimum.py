"""Plans for few ranks against proven optima."""

import pytest

from evermesh.parallelism import CostModel, Layout, plan_batch
from tests.parallelism.planner.exact import is_possible, optimum, random_instance


@pytest.mark.parametrize("seed", range(10))
def test_plans_for_few_ranks_are_within_half_a_percent_of_the_optimum(seed: int) -> None:
    lengths, layout, cost = random_instance(seed, ranks=(2, 3, 4), most=7)
    certificate = plan_batch(lengths, layout, cost).certificate
    best = optimum(lengths, layout, cost, certificate.makespan_s, 5.0)
    assert best.found_s <= 1.001 * best.proven_s, "the instance is too large to be solved here"
    assert certificate.lower_bound_s <= best.found_s * 1.0005
    assert certificate.makespan_s <= 1.005 * best.proven_s


def test_the_solver_finds_the_optimum_of_cases_worked_out_by_hand() -> None:
    cost = CostModel(token_s=1.0, pair_s=0.0, micro_batch_s=0.0)
    layout = Layout(hdp=3, capacity=1000)
    # three whole ones level two ranks; what is shared costs nothing, so that all ranks can end at the mean
    assert optimum([600, 500, 100], layout, cost, 1000, 5.0).found_s == pytest.approx(400, rel=1e-3)
    costly = cost.model_copy(update={"ring_step_s": 1000.0})
    assert optimum([600, 500, 100, 550], layout, costly, 1000, 5.0).found_s == pytest.approx(600, rel=1e-3)
    assert is_possible([600, 500, 100, 550], layout, costly, 599.0, 5.0) is False
    assert is_possible([600, 500, 100, 550], layout, costly, 600.1, 5.0) is True
    # 700 and 100 in one micro-batch, 600 and 500 in two; every other way gives a rank 1,200 tokens or more
    packed = costly.model_copy(update={"micro_batch_s": 50.0})
    found = optimum([700, 600, 500, 100], Layout(hdp=2, capacity=1000), packed, 2000, 5.0)
    assert found.found_s == pytest.approx(600 + 50 + 500 + 50, rel=1e-3)
