"""What follows from the end of a generation: pure functions from what was observed to a decision with its reason."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

REQUEUE = 75
"""EX_TEMPFAIL: run me again later."""
DO_NOT_REQUEUE = 93
"""Another start would end the same way."""
NO_PROGRESS_LIMIT = 3
"""Generations in a row without progress after which nothing is started any more."""
PROGRESS_AFTER_S = 60.0
"""A script that never reports progress is believed to have made some when it ran this long."""
_PEER_LOST = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|recvBytes|sendBytes|"
    r"Connection refused|remote process exited|NCCL communicator was aborted|DistNetworkError",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Failure:
    """How one rank ended that should not have."""

    rank: int
    code: int
    """Its exit code, or minus the signal that killed it."""
    time_s: float
    """Monotonic clock."""
    text: str
    """Its traceback, or the last lines of its errors."""
    has_traceback: bool = False

    @property
    def how(self) -> str:
        """In words, on one line."""
        error = f" ({self.text.splitlines()[-1].strip()})" if self.has_traceback else ""
        if self.code >= 0:
            return f"failed with exit code {self.code}{error}"
        try:
            return f"was killed by {signal.Signals(-self.code).name}{error}"
        except ValueError:  # a real-time signal
            return f"was killed by signal {-self.code}"

    @property
    def is_lost_peer(self) -> bool:
        """It only noticed, as far as its last words tell, that another rank is gone."""
        by_itself = self.code > 0 or self.code == -signal.SIGABRT  # a thread of gloo that meets the loss aborts
        return by_itself and self.code not in (REQUEUE, DO_NOT_REQUEUE) and bool(_PEER_LOST.search(self.text))


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress file at one moment."""

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
class Generation:
    """How one generation ended."""

    ran_s: float
    failures: tuple[Failure, ...]
    """In the order in which they were noticed, before anything was stopped."""
    reported: bool
    """The script reported progress in it."""
    reports: bool
    """The script reported progress in this or an earlier generation."""

    @property
    def made_progress(self) -> bool:
        return self.reported or (not self.reports and self.ran_s >= PROGRESS_AFTER_S)


@dataclass(frozen=True, slots=True)
class Observation:
    """All that a decision depends on."""

    generations: tuple[Generation, ...]
    """Oldest first; the last one has just ended."""
    max_restarts: int
    stopped_by: signal.Signals | None = None
    """The first signal that asked for the end of the job."""
    forwarded: frozenset[int] = frozenset()
    """Signals that were passed on to the ranks without asking for the end."""


@dataclass(frozen=True, slots=True)
class Again:
    """Start all ranks again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Finish:
    """End with this exit code."""

    exit_code: int
    reason: str


def decide(seen: Observation) -> Again | Finish:
    """What to do after a generation has ended."""
    failures = seen.generations[-1].failures
    for asked in (REQUEUE, DO_NOT_REQUEUE):
        if any(failure.code == asked for failure in failures):
            return Finish(
                asked, f"the script ended with {asked} ({'requeue' if asked == REQUEUE else 'do not requeue'})"
            )
    if seen.stopped_by is not None:
        return Finish(128 + seen.stopped_by, f"stopped by {seen.stopped_by.name}")
    if not failures:
        return Finish(0, "every rank ended with 0")
    first = root_cause(failures)
    if -first.code in seen.forwarded:
        return Finish(128 - first.code, f"rank {first.rank} does not catch {signal.Signals(-first.code).name}")
    return _after_failure(seen, first)


def _after_failure(seen: Observation, first: Failure) -> Again | Finish:
    restarts, idle = len(seen.generations) - 1, _without_progress(seen.generations)
    if idle >= NO_PROGRESS_LIMIT:
        same = " and failed with the same traceback" if _is_same_error(seen.generations[-NO_PROGRESS_LIMIT:]) else ""
        return Finish(DO_NOT_REQUEUE, f"{idle} starts in a row made no progress{same}")
    if restarts >= seen.max_restarts:
        return Finish(1, f"rank {first.rank} {first.how}; {restarts} of {seen.max_restarts} restarts are used")
    progress = f"{idle} of {NO_PROGRESS_LIMIT} starts in a row without progress" if idle else "there was progress"
    return Again(f"rank {first.rank} {first.how}; {progress}")


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The earliest failure that is not only the loss of a peer; the earliest of all where there is no other."""
    return min(failures, key=lambda failure: (failure.is_lost_peer, failure.time_s))


def _without_progress(generations: Sequence[Generation]) -> int:
    """How many of the last generations in a row made no progress."""
    idle = 0
    for generation in reversed(generations):
        if generation.made_progress:
            break
        idle += 1
    return idle


def _is_same_error(generations: Sequence[Generation]) -> bool:
    causes = [root_cause(generation.failures) for generation in generations]
    texts = {re.sub(r"0x[0-9a-f]+", "0x", cause.text) for cause in causes}
    return len(texts) == 1 and all(cause.has_traceback for cause in causes)
