"""Plans for few ranks against proven optima."""

import pytest

from evermesh.parallelism import CostModel, Layout, plan_batch, verify_plan
from tests.parallelism.planner.exact import is_possible, random_instance


@pytest.mark.parametrize("seed", range(10))
def test_the_optimum_is_between_the_bound_and_half_a_percent_below_our_plan(seed: int) -> None:
    lengths, layout, cost = random_instance(seed, ranks=(2, 3, 4), most=6)
    plan = plan_batch(lengths, layout, cost, effort=1.0)
    verify_plan(plan, lengths, layout, cost=cost)  # the plan exists, and takes as long as it says
    certificate = plan.certificate
    assert is_possible(lengths, layout, cost, certificate.lower_bound_s * 0.999, 5.0) is False
    assert is_possible(lengths, layout, cost, certificate.makespan_s / 1.005, 5.0) is False


def test_the_solver_knows_cases_worked_out_by_hand() -> None:
    costly = CostModel(token_s=1.0, pair_s=0.0, micro_batch_s=0.0, ring_step_s=1000.0)
    layout = Layout(hdp=3, capacity=1000)
    assert is_possible([600, 500, 100, 550], layout, costly, 599.0, 5.0) is False
    assert is_possible([600, 500, 100, 550], layout, costly, 600.1, 5.0) is True
    # two halves of 1,000, which take a step of the ring, beside 500; with two ranks 500 is cut in halves too
    shared = costly.model_copy(update={"ring_step_s": 10.0})
    assert is_possible([1000, 500], layout, shared, 509.0, 5.0) is False
    assert is_possible([1000, 500], layout, shared, 510.5, 5.0) is True
    assert is_possible([1000, 500], Layout(hdp=2, capacity=1000), shared, 769.0, 5.0) is False
    assert is_possible([1000, 500], Layout(hdp=2, capacity=1000), shared, 770.5, 5.0) is True
    # 700 and 100 in one micro-batch, 600 and 500 in two; every other way gives a rank more
    packed = costly.model_copy(update={"micro_batch_s": 50.0})
    assert is_possible([700, 600, 500, 100], Layout(hdp=2, capacity=1000), packed, 1199.0, 5.0) is False
    assert is_possible([700, 600, 500, 100], Layout(hdp=2, capacity=1000), packed, 1200.1, 5.0) is True
