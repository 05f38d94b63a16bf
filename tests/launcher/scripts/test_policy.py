"""The policy after a failure: restarts, progress, exit codes, and whose failure counts."""

import signal

import pytest

from evermesh.launcher.scripts.policy import (
    Again,
    Failure,
    Finish,
    Generation,
    Observation,
    Progress,
    decide,
    root_cause,
)

BUG = Failure(1, 1, 5.0, "Traceback (most recent call last):\nValueError: boom", has_traceback=True)
KILLED = Failure(0, -9, 5.0, "")


def ended(*failures: Failure, ran_s: float = 3.0, reported: bool = False, reports: bool = False) -> Generation:
    return Generation(ran_s, failures, reported, reports or reported)


def after(*generations: Generation, max_restarts: int = 100, **more: object) -> Again | Finish:
    return decide(Observation(generations, max_restarts, **more))  # type: ignore[arg-type]


def test_a_job_whose_ranks_all_end_with_0_is_done() -> None:
    assert after(ended()) == Finish(0, "every rank ended with 0")


def test_without_restarts_the_first_failure_ends_the_job_with_1() -> None:
    found = after(ended(BUG), max_restarts=0)
    assert found == Finish(1, "rank 1 failed with exit code 1 (ValueError: boom); 0 of 0 restarts are used")


def test_a_killed_rank_restarts_all_while_restarts_are_left() -> None:
    assert after(ended(KILLED)) == Again("rank 0 was killed by SIGKILL; 1 of 3 starts in a row without progress")
    assert isinstance(after(ended(KILLED, reported=True), ended(KILLED, reported=True), max_restarts=1), Finish)


def test_three_starts_in_a_row_without_progress_are_the_end() -> None:
    found = after(ended(KILLED, reported=True), ended(BUG), ended(BUG), ended(BUG))
    assert found == Finish(93, "3 starts in a row made no progress and failed with the same traceback")
    assert after(ended(BUG), ended(KILLED), ended(BUG)) == Finish(93, "3 starts in a row made no progress")
    assert isinstance(after(ended(BUG), ended(BUG), ended(BUG, reported=True)), Again)


def test_a_script_that_reports_nothing_made_progress_when_it_ran_for_a_minute() -> None:
    assert isinstance(after(*[ended(KILLED, ran_s=61.0)] * 9), Again)
    assert after(*[ended(KILLED, ran_s=59.0)] * 3) == Finish(93, "3 starts in a row made no progress")


def test_a_script_that_reports_is_taken_at_its_word_however_long_it_ran() -> None:
    generations = [ended(KILLED, reported=True), *[ended(KILLED, ran_s=900.0, reports=True)] * 3]
    assert after(*generations) == Finish(93, "3 starts in a row made no progress")


@pytest.mark.parametrize("code", [75, 93])
def test_the_wish_of_a_script_about_its_queue_is_passed_on_with_or_without_a_signal(code: int) -> None:
    for stopped_by in (None, signal.SIGTERM):
        found = after(ended(BUG, Failure(0, code, 6.0, "")), stopped_by=stopped_by)
        assert isinstance(found, Finish)
        assert found.exit_code == code


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_job_is_not_started_again(number: signal.Signals, code: int) -> None:
    assert after(ended(Failure(0, -number, 1.0, "")), stopped_by=number) == Finish(code, f"stopped by {number.name}")


def test_a_rank_that_dies_of_a_signal_we_passed_on_is_not_started_again() -> None:
    found = after(ended(Failure(0, -signal.SIGHUP, 1.0, "")), forwarded=frozenset({signal.SIGHUP}))
    assert found == Finish(129, "rank 0 does not catch SIGHUP")


def test_the_first_failure_counts_unless_it_only_lost_its_peer() -> None:
    lost = Failure(0, 1, 1.0, "RuntimeError: Connection closed by peer [127.0.0.1]:80", has_traceback=True)
    aborted = Failure(2, -signal.SIGABRT, 2.0, "terminate called: Connection reset by peer")
    assert root_cause([lost, aborted, BUG]) is BUG
    assert root_cause([lost, aborted]) is lost


def test_progress_is_a_higher_number_or_another_touch() -> None:
    assert Progress(2, 11).is_beyond(Progress(1, 10))
    assert not Progress(2, 10).is_beyond(Progress(1, 10))
    assert Progress(1, None).is_beyond(Progress())
    assert Progress(2, None).is_beyond(Progress(1, None))
    assert not Progress(1, None).is_beyond(Progress(1, None))
