"""What follows from failed attempts."""

import pytest

from evermesh.fault.events import Abort, Restart
from evermesh.launcher.restarts import FailedAttempt, attempts_without_progress, decide


def died(began_at: int | None, checkpoint: int | None, steps: int = 4) -> FailedAttempt:
    """An attempt in which a worker died."""
    return FailedAttempt("died", steps, began_at, checkpoint)


def test_a_dead_worker_restarts_all_while_restarts_are_left() -> None:
    attempts = [died(None, 10), died(10, 20), died(20, 30)]
    assert decide(attempts, max_restarts=3) == Restart(reason="restart 3 of 3")
    assert decide([*attempts, died(30, 40)], max_restarts=3) == Abort(reason="3 of 3 restarts are used")
    assert decide([died(None, 10)], max_restarts=0) == Abort(reason="0 of 0 restarts are used")


def test_an_exception_before_the_first_step_is_not_retried() -> None:
    assert isinstance(decide([FailedAttempt("raised", 0, None, None)], max_restarts=9), Abort)
    assert isinstance(decide([FailedAttempt("raised", 1, None, None)], max_restarts=9), Restart)


def test_a_worker_that_dies_before_the_first_step_is_started_again() -> None:
    assert isinstance(decide([died(None, None, steps=0)], max_restarts=9), Restart)


def test_an_error_that_says_what_to_change_is_not_retried() -> None:
    assert isinstance(decide([FailedAttempt("refused", 50, 10, 20)], max_restarts=9), Abort)


@pytest.mark.parametrize("first", [None, 20])
def test_three_attempts_in_a_row_without_a_new_checkpoint_end_the_run(first: int | None) -> None:
    idle = died(first, first)
    assert isinstance(decide([idle, idle], max_restarts=9), Restart)
    assert decide([idle] * 3, max_restarts=9) == Abort(reason="3 attempts in a row reached no new checkpoint")


def test_a_new_checkpoint_starts_the_count_again() -> None:
    attempts = [died(10, 10), died(10, 10), died(10, 20), died(20, 20)]
    assert attempts_without_progress(attempts) == 1
    assert isinstance(decide(attempts, max_restarts=9), Restart)
