"""How often a snapshot is made: against every other interval, and against what failures would be expected by hand."""

import math

import pytest

from evermesh.fault.snapshot.frequency import Failures, Measured, choose, failure_every_s, is_another, rates_of, told
from evermesh.fault.snapshot.stripes.interval import interval, stretch

HOUR_S = 3600.0
NONE_SEEN = Failures(0, 0.0, 1)
BIG = Measured(step_s=4.0, stop_s=0.5, commit_s=6.0, restart_s=60.0)


@pytest.mark.parametrize("every_s", [600.0, HOUR_S, 50 * HOUR_S])
def test_no_other_interval_that_may_be_paid_for_is_expected_to_lose_less(every_s: float) -> None:
    chosen = choose(BIG, every_s, most_cost=0.5)
    rates = rates_of(BIG, every_s)
    assert stretch(rates, chosen.steps) == min(stretch(rates, steps) for steps in range(2, 3000))
    assert chosen.lost_share == 1 - 1 / stretch(rates, chosen.steps)


@pytest.mark.parametrize("every_s", [100 * HOUR_S, 10_000 * HOUR_S])
def test_however_rare_failures_are_believed_to_be_nothing_is_saved_that_could_not_be_measured(every_s: float) -> None:
    chosen, rates = choose(BIG, every_s, most_cost=0.5), rates_of(BIG, every_s)
    assert chosen.stall_share <= 0.001 < interval(rates, chosen.steps - 1).stall_share
    assert stretch(rates, chosen.steps) - min(stretch(rates, steps) for steps in range(2, 9000)) <= 0.001


def test_a_copy_that_hides_is_made_every_step_or_as_often_as_it_is_complete() -> None:
    hidden = Measured(step_s=1.0, stop_s=0.0009, commit_s=0.5, restart_s=5.0)
    assert choose(hidden, 1000 * HOUR_S, 0.01).steps == 1
    assert choose(hidden._replace(commit_s=6.5), 1000 * HOUR_S, 0.01).steps == 7
    assert choose(hidden._replace(stop_s=0.0011), 1000 * HOUR_S, 0.01).steps == 2


def test_a_small_job_never_spends_more_than_it_may_on_copies_whatever_fails() -> None:
    small = Measured(step_s=0.005, stop_s=0.002, commit_s=0.004, restart_s=0.5)
    for every_s in (1.0, 60.0, HOUR_S, 1000 * HOUR_S):
        chosen = choose(small, every_s, most_cost=0.01)
        assert chosen.stall_share <= 0.01
        assert chosen.steps >= 40
    # failures every minute: what may be paid for is what is done, to the step
    assert choose(small, 2.0, 0.01).steps == math.ceil(0.002 * 0.99 / (0.01 * 0.005))


def test_more_failures_mean_more_snapshots() -> None:
    chosen = [choose(BIG, every_s, 0.5).steps for every_s in (60.0, 600.0, HOUR_S, 100 * HOUR_S)]
    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[-1]


def test_what_is_expected_of_a_node_counts_until_something_was_seen() -> None:
    assert failure_every_s(NONE_SEEN, 2000 * HOUR_S) == pytest.approx(2000 * HOUR_S)
    assert failure_every_s(Failures(0, 0.0, 100), 2000 * HOUR_S) == pytest.approx(20 * HOUR_S, rel=1e-4)


def test_a_run_without_failures_is_believed_to_have_better_nodes() -> None:
    assert failure_every_s(Failures(0, 2000 * HOUR_S, 1), 2000 * HOUR_S) == pytest.approx(4000 * HOUR_S)


def test_failures_that_were_seen_count_at_once() -> None:
    seen = Failures(3, HOUR_S, 2)
    assert failure_every_s(seen, 2000 * HOUR_S) == pytest.approx(HOUR_S / 3)
    # as many as were expected: the belief stays
    assert failure_every_s(Failures(1, 2000 * HOUR_S, 1), 2000 * HOUR_S) == pytest.approx(2000 * HOUR_S)


def test_only_a_change_that_matters_is_one() -> None:
    rates = rates_of(BIG, HOUR_S)
    assert is_another(None, interval(rates, 40))
    assert not is_another(interval(rates, 40), interval(rates, 50))
    assert is_another(interval(rates, 40), interval(rates, 51))
    assert is_another(interval(rates, 51), interval(rates, 40))


def test_a_choice_is_told_with_its_reason_and_its_cost() -> None:
    chosen = choose(BIG, HOUR_S, 0.5)
    text = told(chosen, BIG, Failures(3, 3 * HOUR_S, 2), HOUR_S, is_configured=False)
    assert text.startswith(
        f"a snapshot every {chosen.steps} steps ({4 * chosen.steps} s), chosen: it stops training for 500 ms "
    )
    assert "complete after 6 s; a failure is expected every 1 h (2 nodes, 3 seen)" in text
    assert f"Expected loss {chosen.lost_share:.2%} of the time" in text
