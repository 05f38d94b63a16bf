"""What follows from a failed attempt: pure functions from what was seen to a decision with its reason.

One policy for training jobs and for scripts; the machinery that carries it out is elsewhere.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

REQUEUE = 75
"""Exit code EX_TEMPFAIL: run me again later."""
DO_NOT_REQUEUE = 93
"""Exit code of a job that would fail again the same way (the convention of NVIDIA's resiliency extension)."""
NO_PROGRESS_LIMIT = 3
"""Failed attempts in a row without progress after which the job ends."""

Cause = Literal["refused", "raised", "died"]
"""A rank refused the job with an error that names the way out, raised something else, or died without a word."""


class Failure(BaseModel):
    """How one rank ended that should not have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    time_s: float
    """Monotonic clock of its node."""
    how: str
    """What happened to it, in words, on one line: ``was killed by SIGKILL``."""
    cause: Cause = "raised"
    code: int | None = None
    """Exit code, or minus the signal that killed it; None where it told its exception itself."""
    peer_lost: bool = False
    """It only noticed that another rank is gone."""
    text: str = ""
    """What it said last: its traceback, or the end of its log."""
    has_traceback: bool = False


class FailedAttempt(BaseModel):
    """One attempt that failed, as far as what follows depends on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    failures: tuple[Failure, ...]
    """At least one."""
    progressed: bool
    """It left a newer checkpoint than it began with; for a script, it reported progress or ran for a while."""
    has_stepped: bool = True
    """It finished a step; true where that is not known."""


@dataclass(frozen=True, slots=True)
class Again:
    """Start all ranks again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Finish:
    """End the job with this exit code."""

    exit_code: int
    reason: str


def after_failure(attempts: Sequence[FailedAttempt], max_restarts: int) -> Again | Finish:
    """Whether to start all ranks again.

    Args:
        attempts: the failed attempts of this launch, oldest first; the last one has just ended.
        max_restarts: restarts that the job allows.
    """
    last, used = attempts[-1], len(attempts) - 1
    first, idle = root_cause(last.failures), without_progress(attempts)
    for asked, meaning in ((REQUEUE, "requeue"), (DO_NOT_REQUEUE, "do not requeue")):
        if any(failure.code == asked for failure in last.failures):
            return Finish(asked, f"rank {first.rank} ended with {asked} ({meaning})")
    if first.cause == "refused":
        return Finish(1, "the error says what to change; starting again would not change it")
    if first.cause == "raised" and not last.has_stepped:
        return Finish(1, "it was raised before the first step; starting again would raise it again")
    if idle >= NO_PROGRESS_LIMIT:
        same = " and failed with the same traceback" if _is_same_error(attempts[-NO_PROGRESS_LIMIT:]) else ""
        return Finish(DO_NOT_REQUEUE, f"{idle} attempts in a row made no progress{same}")
    if used >= max_restarts:
        return Finish(1, f"{used} of {max_restarts} restarts are used")
    progress = f", {idle} of {NO_PROGRESS_LIMIT} attempts in a row without progress" if idle > 1 else ""
    return Again(f"restart {used + 1} of {max_restarts}{progress}")


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The earliest failure that is not only the loss of a peer; the earliest of all where there is no other."""
    return min(failures, key=lambda failure: (failure.peer_lost, failure.time_s))


def without_progress(attempts: Sequence[FailedAttempt]) -> int:
    """How many of the last attempts in a row made no progress."""
    return sum(1 for _ in itertools.takewhile(lambda attempt: not attempt.progressed, reversed(attempts)))


def _is_same_error(attempts: Sequence[FailedAttempt]) -> bool:
    causes = [root_cause(attempt.failures) for attempt in attempts]
    texts = {re.sub(r"0x[0-9a-f]+", "0x", cause.text) for cause in causes}
    return len(texts) == 1 and all(cause.has_traceback for cause in causes)
