"""What follows from a failed attempt: pure functions from what was seen to a decision with its reason.

One policy for training jobs and for scripts; the machinery that carries it out is elsewhere.
"""

import dataclasses
import itertools
import re
import signal
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
PROGRESS_AFTER_S = 60.0
"""A script that never reports progress is believed to have made some when it ran this long."""
_PEER_LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Connection refused|Broken pipe|Socket closed|recvBytes|sendBytes|"
    r"remote process exited|NCCL communicator was aborted|DistNetworkError",
    re.IGNORECASE,
)
"""What gloo, the rendezvous store and NCCL say when another rank is gone."""

Cause = Literal["refused", "raised", "died", "froze"]
"""A rank refused the job with an error that names the way out, raised something else, died without a word, or was found
stopped or hanging."""


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
class Progress:
    """A progress file at one moment."""

    time_ns: int | None = None
    """When it was written last; None where it does not exist."""
    step: int | None = None
    """The whole number in it, if there is one."""

    def is_beyond(self, before: "Progress") -> bool:
        """Whether there was progress since ``before``: a higher number, or, without numbers, another touch."""
        if self.step is not None and before.step is not None:
            return self.step > before.step
        return self.time_ns is not None and self.time_ns != before.time_ns


@dataclass(frozen=True, slots=True)
class Ending:
    """An attempt of a script has ended: all that what follows depends on."""

    attempts: tuple[FailedAttempt, ...]
    """Failed attempts, oldest first; with the newest, if it failed."""
    is_clean: bool
    """The newest attempt did not fail: what was not stopped ended with 0."""
    max_restarts: int
    stopped_by: signal.Signals | None = None
    """The first signal that asked for the end of the job."""
    forwarded: frozenset[int] = frozenset()
    """Signals that were passed on to the ranks without asking for the end."""
    lost_nodes: tuple[str, ...] = ()
    """Machines that are gone with their launchers, in words."""

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Those of the newest attempt."""
        return () if self.is_clean else self.attempts[-1].failures


@dataclass(frozen=True, slots=True)
class Again:
    """Start all ranks again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Finish:
    """End the job with this exit code."""

    exit_code: int
    reason: str


def after_end(ending: Ending) -> Again | Finish:
    """What follows the end of a script: what it asked for, else what a signal asked for, else as after any failure."""
    asked = _wish(ending.failures)
    if asked is not None:
        return asked
    if ending.stopped_by is not None:
        return Finish(128 + ending.stopped_by, f"stopped by {ending.stopped_by.name}")
    if ending.lost_nodes:
        return Finish(REQUEUE, f"lost: {', '.join(ending.lost_nodes)}; a script gets no other machine")
    if ending.is_clean:
        return Finish(0, "every rank ended with 0")
    first = root_cause(ending.failures)
    if first.code is not None and -first.code in ending.forwarded:
        return Finish(128 - first.code, f"rank {first.rank} does not catch {signal.Signals(-first.code).name}")
    answer = after_failure(ending.attempts, ending.max_restarts)
    return dataclasses.replace(answer, reason=f"rank {first.rank} {first.how}; {answer.reason}")


def after_failure(attempts: Sequence[FailedAttempt], max_restarts: int) -> Again | Finish:
    """Whether to start all ranks again.

    Args:
        attempts: the failed attempts of this launch, oldest first; the last one has just ended.
        max_restarts: restarts that the job allows.
    """
    last, used = attempts[-1], len(attempts) - 1
    first, idle = root_cause(last.failures), without_progress(attempts)
    asked = _wish(last.failures)
    if asked is not None:
        return asked
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


def made_progress(*, reported: bool, ever_reported: bool, ran_s: float) -> bool:
    """Whether an attempt of a script got anywhere: what it reports, and how long it ran if it never reported."""
    return reported or (not ever_reported and ran_s >= PROGRESS_AFTER_S)


def is_lost_peer(code: int, text: str) -> bool:
    """Whether a process only noticed, as far as its last words tell, that another rank is gone."""
    by_itself = code > 0 or code == -signal.SIGABRT  # a thread of gloo that meets the loss aborts
    return by_itself and code not in (REQUEUE, DO_NOT_REQUEUE) and bool(_PEER_LOST.search(text))


def without_progress(attempts: Sequence[FailedAttempt]) -> int:
    """How many of the last attempts in a row made no progress."""
    return sum(1 for _ in itertools.takewhile(lambda attempt: not attempt.progressed, reversed(attempts)))


def _wish(failures: Sequence[Failure]) -> Finish | None:
    """The exit code by which a rank says what its queue should do, the friendlier one first."""
    for asked, meaning in ((REQUEUE, "requeue"), (DO_NOT_REQUEUE, "do not requeue")):
        for failure in failures:
            if failure.code == asked:
                return Finish(asked, f"rank {failure.rank} ended with {asked} ({meaning})")
    return None


def _is_same_error(attempts: Sequence[FailedAttempt]) -> bool:
    causes = [root_cause(attempt.failures) for attempt in attempts]
    texts = {re.sub(r"0x[0-9a-f]+", "0x", cause.text) for cause in causes}
    return len(texts) == 1 and all(cause.has_traceback for cause in causes)
