"""What follows from a failure, a signal or a wish: a table of situations, for training jobs and for scripts."""

import signal
from collections.abc import Sequence

import pytest

from evermesh.launcher.policy import (
    Again,
    Cause,
    Ending,
    FailedAttempt,
    Failure,
    Finish,
    Progress,
    after_end,
    after_failure,
    is_lost_peer,
    made_progress,
    root_cause,
)


def failure(
    how: str,
    *,
    rank: int = 0,
    code: int | None = None,
    cause: Cause = "raised",
    time_s: float = 5.0,
    lost: bool = False,
) -> Failure:
    text = how if cause == "raised" else ""
    return Failure(
        rank=rank, time_s=time_s, how=how, cause=cause, code=code, peer_lost=lost, text=text, has_traceback=bool(text)
    )


KILLED = failure("was killed by SIGKILL", code=-9, cause="died")
BUG = failure("failed with exit code 1 (ValueError: boom)", rank=1, code=1)
TOLD = failure("failed: KeyError: 'x'")
REFUSED = failure("failed: the mesh does not fit", cause="refused")


def asks(code: int) -> Failure:
    return failure(f"failed with exit code {code}", rank=2, code=code, time_s=9.0)


def attempt(*failures: Failure, progressed: bool = False, stepped: bool = True) -> FailedAttempt:
    return FailedAttempt(failures=failures, progressed=progressed, has_stepped=stepped)


NO_PROGRESS = "3 attempts in a row made no progress"
SAME = f"{NO_PROGRESS} and failed with the same traceback"
USELESS = "it was raised before the first step; starting again would raise it again"


@pytest.mark.parametrize(
    ("attempts", "max_restarts", "expected"),
    [
        # a rank dies
        ([attempt(KILLED)], 3, Again("restart 1 of 3")),
        ([attempt(KILLED, stepped=False)], 3, Again("restart 1 of 3")),
        ([attempt(KILLED)], 0, Finish(1, "0 of 0 restarts are used")),
        ([attempt(KILLED, progressed=True)] * 2, 1, Finish(1, "1 of 1 restarts are used")),
        # a rank raises
        ([attempt(TOLD)], 3, Again("restart 1 of 3")),
        ([attempt(TOLD, stepped=False)], 3, Finish(1, USELESS)),
        ([attempt(KILLED), attempt(TOLD, stepped=False)], 3, Finish(1, USELESS)),
        ([attempt(REFUSED)], 3, Finish(1, "the error says what to change; starting again would not change it")),
        # again and again
        ([attempt(KILLED)] * 2, 9, Again("restart 2 of 9, 2 of 3 attempts in a row without progress")),
        ([attempt(KILLED)] * 3, 9, Finish(93, NO_PROGRESS)),
        ([attempt(BUG)] * 3, 9, Finish(93, SAME)),
        ([attempt(BUG), attempt(KILLED), attempt(BUG)], 9, Finish(93, NO_PROGRESS)),
        ([attempt(KILLED, progressed=True), *[attempt(BUG)] * 3], 9, Finish(93, SAME)),
        ([attempt(BUG), attempt(BUG), attempt(BUG, progressed=True)], 9, Again("restart 3 of 9")),
        ([*[attempt(BUG)] * 2, attempt(BUG, progressed=True), attempt(BUG)], 9, Again("restart 4 of 9")),
        # a rank says what its queue should do
        ([attempt(BUG, asks(75))], 3, Finish(75, "rank 2 ended with 75 (requeue)")),
        ([attempt(BUG, asks(93))], 3, Finish(93, "rank 2 ended with 93 (do not requeue)")),
        ([attempt(asks(93), asks(75))], 3, Finish(75, "rank 2 ended with 75 (requeue)")),
    ],
)
def test_what_follows_a_failure(attempts: Sequence[FailedAttempt], max_restarts: int, expected: Again | Finish) -> None:
    assert after_failure(attempts, max_restarts) == expected


def hung_up(number: int) -> Failure:
    return failure("was killed by SIGHUP", code=-number, cause="died")


FORWARDED = frozenset({signal.SIGHUP})


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (Ending((), True, 0), Finish(0, "every rank ended with 0")),
        (Ending((attempt(BUG),), True, 3), Finish(0, "every rank ended with 0")),
        (Ending((attempt(KILLED),), False, 3), Again("rank 0 was killed by SIGKILL; restart 1 of 3")),
        (
            Ending((attempt(BUG),), False, 0),
            Finish(1, "rank 1 failed with exit code 1 (ValueError: boom); 0 of 0 restarts are used"),
        ),
        (Ending((), True, 3, signal.SIGTERM), Finish(143, "stopped by SIGTERM")),
        (Ending((attempt(KILLED),), False, 3, signal.SIGINT), Finish(130, "stopped by SIGINT")),
        (
            Ending((attempt(asks(75)),), False, 3, signal.SIGTERM),
            Finish(75, "rank 2 ended with 75 (requeue)"),
        ),
        (
            Ending((attempt(hung_up(signal.SIGHUP)),), False, 3, forwarded=FORWARDED),
            Finish(129, "rank 0 does not catch SIGHUP"),
        ),
        (
            Ending((attempt(hung_up(signal.SIGHUP)),), False, 3),
            Again("rank 0 was killed by SIGHUP; restart 1 of 3"),
        ),
        (
            Ending((attempt(KILLED),), False, 3, lost_nodes=("node 1", "node 2")),
            Finish(75, "lost: node 1, node 2; a script gets no other machine"),
        ),
        (
            Ending((), True, 3, signal.SIGTERM, lost_nodes=("node 1",)),
            Finish(143, "stopped by SIGTERM"),
        ),
    ],
)
def test_what_follows_the_end_of_a_script(ending: Ending, expected: Again | Finish) -> None:
    assert after_end(ending) == expected


@pytest.mark.parametrize(
    ("reported", "ever_reported", "ran_s", "expected"),
    [
        (True, True, 0.1, True),
        (False, False, 61.0, True),
        (False, False, 59.0, False),
        (False, True, 900.0, False),  # it is taken at its word, however long it ran
    ],
)
def test_when_a_script_has_made_progress(reported: bool, ever_reported: bool, ran_s: float, expected: bool) -> None:
    assert made_progress(reported=reported, ever_reported=ever_reported, ran_s=ran_s) is expected


def test_progress_is_a_higher_number_or_another_touch() -> None:
    assert Progress(2, 11).is_beyond(Progress(1, 10))
    assert not Progress(2, 10).is_beyond(Progress(1, 10))
    assert Progress(1, None).is_beyond(Progress())
    assert Progress(2, None).is_beyond(Progress(1, None))
    assert not Progress(1, None).is_beyond(Progress(1, None))


def test_the_first_failure_counts_unless_it_only_lost_its_peer() -> None:
    lost = failure("lost", rank=2, code=1, time_s=1.0, lost=True)
    later = failure("lost", rank=3, code=1, time_s=2.0, lost=True)
    assert root_cause([later, lost, BUG]) is BUG
    assert root_cause([later, lost]) is lost


@pytest.mark.parametrize(
    ("code", "text", "expected"),
    [
        (1, "RuntimeError: Connection closed by peer [127.0.0.1]:80", True),
        (-signal.SIGABRT, "terminate called: Connection reset by peer", True),
        (1, "torch.distributed.DistNetworkError: failed to recv", True),
        (-signal.SIGKILL, "Connection closed by peer", False),
        (1, "ValueError: boom", False),
        (75, "Connection closed by peer", False),
    ],
)
def test_who_only_lost_a_peer_says_so(code: int, text: str, expected: bool) -> None:
    assert is_lost_peer(code, text) is expected
