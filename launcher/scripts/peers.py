"""What the launchers of one job tell each other when their ranks have ended, and the decision they all follow.

Every launcher submits a report when no process of its ranks is left; node 0 decides when it has all of them. So no rank
of a generation is started anywhere while one of the generation before still runs.
"""

import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from evermesh.launcher.policy import Ending, FailedAttempt, Failure, Finish, after_end, made_progress, root_cause
from evermesh.launcher.scripts.nodes import Node
from evermesh.launcher.scripts.values import Frozen
from evermesh.launcher.scripts.wakeups import Wakeups


class Report(Frozen):
    """How the ranks of one machine ended."""

    failures: tuple[Failure, ...] = ()
    """In the order in which they were noticed, before anything was stopped."""
    told: str = ""
    """What a user should read about the first of them."""
    has_progressed: bool = False
    """The script reported progress."""
    ran_s: float = 0.0
    forwarded: frozenset[int] = frozenset()
    """Signals that were passed on without asking for the end."""
    sent_s: float
    """Monotonic clock of its machine."""

    def received(self) -> "Report":
        """The same with the times of the failures on the clock of this machine."""
        behind_s = time.monotonic() - self.sent_s
        failures = [failure.model_copy(update={"time_s": failure.time_s + behind_s}) for failure in self.failures]
        return self.model_copy(update={"failures": tuple(failures)})


class Verdict(Frozen):
    """What all launchers of the job do next."""

    exit_code: int | None
    """What to end with; None: start all ranks again."""
    reason: str
    told: str = ""
    """What a user should read about the failure that decided it."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Whom to tell what came from another machine."""

    wakeups: Wakeups
    stop: Callable[[int], None]
    """A signal asks for the end of the job."""
    kill: Callable[[], None]
    """And another one for its end at once."""


class Peers(Protocol):
    """The other launchers of the job, as this one sees them."""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Those of this machine."""

    @property
    def is_ending(self) -> bool:
        """The ranks of another machine failed, or the machine is lost: end the generation."""

    def listen(self, listener: Listener) -> None:
        """Begin to take what they say."""

    def tell_failure(self) -> None:
        """A rank here has failed."""

    def tell_stop(self, number: int) -> None:
        """A signal asks for the end of the job."""

    def tell_kill(self) -> None:
        """For its end at once."""

    def submit(self, report: Report) -> None:
        """No process of this generation is left here."""

    def verdict(self) -> Verdict | None:
        """What to do next; None: it is not decided yet."""


class Judge:
    """Remembers the generations of a job, and asks the policy what follows each."""

    def __init__(self, max_restarts: int) -> None:
        self._max_restarts = max_restarts
        self._failed: list[FailedAttempt] = []
        self._ever_reported = False

    def judge(
        self, reports: Mapping[int, Report], stopped_by: int | None = None, lost_nodes: tuple[str, ...] = ()
    ) -> Verdict:
        """What follows a generation, from the reports of all nodes that are left."""
        failures = tuple(failure for report in reports.values() for failure in report.failures)
        reported = any(report.has_progressed for report in reports.values())
        self._ever_reported |= reported
        ran_s = max((report.ran_s for report in reports.values()), default=0.0)
        if failures:
            progressed = made_progress(reported=reported, ever_reported=self._ever_reported, ran_s=ran_s)
            self._failed.append(FailedAttempt(failures=failures, progressed=progressed))
        ending = Ending(
            attempts=tuple(self._failed),
            is_clean=not failures,
            max_restarts=self._max_restarts,
            stopped_by=None if stopped_by is None else signal.Signals(stopped_by),
            forwarded=frozenset().union(*(report.forwarded for report in reports.values())),
            lost_nodes=lost_nodes,
        )
        answer = after_end(ending)
        code = answer.exit_code if isinstance(answer, Finish) else None
        return Verdict(exit_code=code, reason=answer.reason, told=_told(reports, failures))


class Alone:
    """There is no other launcher: all nodes are on this machine."""

    is_ending = False

    def __init__(self, nodes: tuple[Node, ...], max_restarts: int) -> None:
        self.nodes = nodes
        self._judge = Judge(max_restarts)
        self._stopped_by: int | None = None
        self._verdict: Verdict | None = None

    def listen(self, listener: Listener) -> None:
        """Nobody says anything."""

    def tell_failure(self) -> None:
        """Nobody else needs to know."""

    def tell_stop(self, number: int) -> None:
        self._stopped_by = number

    def tell_kill(self) -> None:
        """Nobody else needs to know."""

    def submit(self, report: Report) -> None:
        self._verdict = self._judge.judge({0: report}, self._stopped_by)

    def verdict(self) -> Verdict | None:
        return self._verdict


def _told(reports: Mapping[int, Report], failures: tuple[Failure, ...]) -> str:
    """The root cause of all is the root cause of one of them."""
    if not failures:
        return ""
    first = root_cause(failures)
    return next(report.told for report in reports.values() if first in report.failures)
