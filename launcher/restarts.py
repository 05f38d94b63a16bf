"""What follows from a failed attempt: a pure function from what was seen to a decision with its reason."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evermesh.fault.events import Abort, Restart

NO_PROGRESS_LIMIT = 3
"""Failed attempts in a row without a new checkpoint after which the run ends."""
DO_NOT_REQUEUE = 93
"""Exit code of a run that would fail again the same way (the convention of NVIDIA's resiliency extension)."""

Cause = Literal["refused", "raised", "died"]
"""A worker refused the job with an error that names the way out, raised something else, or died without a word."""


@dataclass(frozen=True, slots=True)
class FailedAttempt:
    """One attempt that failed."""

    cause: Cause
    steps: int
    """Steps that it trained."""
    began_at: int | None
    """Step of the newest checkpoint before it; None: there was none."""
    checkpoint: int | None
    """Step of the newest checkpoint after it."""

    @property
    def progressed(self) -> bool:
        """Whether it left a newer checkpoint."""
        return (self.checkpoint or 0) > (self.began_at or 0)


def decide(attempts: Sequence[FailedAttempt], max_restarts: int) -> Restart | Abort:
    """Whether to start all workers again.

    Args:
        attempts: the failed attempts of this launch, oldest first; the last one has just ended.
        max_restarts: restarts that the job allows.
    """
    last, used = attempts[-1], len(attempts) - 1
    if last.cause == "refused":
        return Abort(reason="the error says what to change; starting again would not change it")
    if last.cause == "raised" and last.steps == 0:
        return Abort(reason="it was raised before the first step; starting again would raise it again")
    if attempts_without_progress(attempts) >= NO_PROGRESS_LIMIT:
        return Abort(reason=f"{NO_PROGRESS_LIMIT} attempts in a row reached no new checkpoint")
    if used >= max_restarts:
        return Abort(reason=f"{used} of {max_restarts} restarts are used")
    return Restart(reason=f"restart {used + 1} of {max_restarts}")


def attempts_without_progress(attempts: Sequence[FailedAttempt]) -> int:
    """How many of the last attempts in a row left no newer checkpoint than they began with."""
    return sum(1 for _ in itertools.takewhile(lambda attempt: not attempt.progressed, reversed(attempts)))
