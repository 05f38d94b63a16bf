"""A watcher outside of the ranks: it reads their rings as agents do, and joins what it read as a controller does."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evermesh.fault.connections import connections_of
from evermesh.fault.detectors import Context, Diagnosis, diagnose, kinds
from evermesh.fault.detectors.links import LinkWatch
from evermesh.fault.detectors.streaming import JobWatch
from evermesh.fault.detectors.summaries import RankWatch
from evermesh.fault.events import Finding
from evermesh.fault.process_state import ProcessState
from evermesh.fault.processors import QueueWatch
from evermesh.fault.recorder.reader import process_of, read_ring
from evermesh.fault.recorder.trace import RankTrace

PERIOD_S, LINKS_EVERY_S, WHOLE_EVERY_S = 0.1, 0.4, 2.0
_LEAST_PATIENCE_S, _PATIENCE_S = 1.5, {kinds.SLOW_JOB: 8.0}
"""How long what names nobody has to last; what is lost on a way is sent again after 0.2, 0.6 and 1.4 s."""
_SAID_BY_WINDOWS = (kinds.SLOW_RANK, kinds.GRADUAL)
"""By whoever knows since when; a controller, too, believes no whole rings in this."""
Bend = Callable[[RankTrace], RankTrace]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look says."""

    findings: tuple[Finding, ...]
    by: str
    """``windows``, ``suspicion`` (rings read because windows did not agree) or ``rings`` (read every now and then)."""


class Watcher:
    """Watches the rings of one job.

    Args:
        rings: one per rank; all are there.
        context: what is known besides.
        bend: what becomes of a ring as it is read; None: nothing.
    """

    def __init__(self, rings: Sequence[Path], context: Context, bend: Bend | None = None) -> None:
        self._rings, self._context, self._bend = rings, context, bend
        self._watches = [RankWatch() for _ in rings]
        self._job = JobWatch(context)
        self._links_at_s = self._vague_since_s = self._vague_at_s = 0.0
        self._starved: dict[int, float] = {}
        self._skew_s = 0.0
        self.step = 0
        """The newest that a rank was in at the last look."""
        self._links, self._queues = LinkWatch(), QueueWatch()
        self._heads = [read_ring(path) for path in rings]
        self._whole_at_s = time.monotonic() + WHOLE_EVERY_S

    def read(self) -> tuple[list[RankTrace], dict[int, ProcessState | None]]:
        """All rings, and what the processes do that write them."""
        states = {trace.rank: process_of(trace, state) for trace, state in self._heads}
        read = [read_ring(path)[0] for path in self._rings]  # behind that: what has ended writes no more
        self._skew_s = (
            read[-1].read_ns - read[0].read_ns
        ) / 1e9  # one reader and one clock, whatever the nodes are called
        return [self._bend(trace) if self._bend else trace for trace in read], states

    def look(self) -> Seen:
        """What is to be seen now."""
        traces, states = self.read()
        self.step = max(trace.step for trace in traces)
        self._starved = {trace.rank: self._queues.look(trace.pid) for trace in traces}
        context = self._job.context = self._known(states)
        seen = self._job.join([watch.summarise(trace) for watch, trace in zip(self._watches, traces, strict=True)])
        found = Seen(seen.findings, "windows")
        if seen.suspicious:
            found = Seen(diagnose(traces, context).findings, "suspicion")
        if time.monotonic() >= self._links_at_s:
            self._look_at_links(traces)
        if not found.findings and time.monotonic() >= self._whole_at_s:
            self._whole_at_s = time.monotonic() + WHOLE_EVERY_S
            whole = [one for one in diagnose(traces, context).findings if one.kind not in _SAID_BY_WINDOWS]
            found = Seen((*whole, *self._links.find_slow(traces)), "rings")
        return self._named(found, traces)

    def _named(self, found: Seen, traces: Sequence[RankTrace]) -> Seen:
        """What names somebody; what names nobody only if it lasts: nobody can act on it, and more may be known soon."""
        vague = [one for one in found.findings if one.rank is None and one.link is None and one.node is None]
        if not vague:
            return found
        if len(vague) < len(found.findings):
            return replace(found, findings=tuple(one for one in found.findings if one not in vague))
        now_s = time.monotonic()
        if now_s - self._vague_at_s > 2 * WHOLE_EVERY_S:
            self._vague_since_s = now_s
        self._vague_at_s = now_s
        if any(one.kind == kinds.COMMUNICATION_HANG for one in vague):
            self._look_at_links(traces)
        patience_s = max(_PATIENCE_S.get(one.kind, _LEAST_PATIENCE_S) for one in vague)
        return found if now_s - self._vague_since_s >= patience_s else Seen((), "")

    def _look_at_links(self, traces: Sequence[RankTrace]) -> None:
        rank_of = {trace.pid: trace.rank for trace in traces}
        found = connections_of(list(rank_of))
        self._links.look({rank_of[pid]: of for pid, of in found.items()})
        self._links_at_s = time.monotonic() + LINKS_EVERY_S

    def diagnose(self) -> Diagnosis:
        """What the rings say as they are now."""
        traces, states = self.read()
        return diagnose(traces, self._known(states))

    def _known(self, states: Mapping[int, ProcessState | None]) -> Context:
        return replace(
            self._context, processes=states, starved=self._starved, cut_links=self._links.cut, skew_s=self._skew_s
        )
