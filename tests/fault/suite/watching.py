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

PERIOD_S, WHOLE_EVERY_S = 0.1, 2.0
_LOOKS_AT_LINKS = 8
"""Before a hang is told that names no way: what is lost is sent again after 0.2, 0.6 and 1.4 s."""
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
        self._asked = 0
        self._starved: dict[int, float] = {}
        self._links, self._queues = LinkWatch(), QueueWatch()
        self._heads = [read_ring(path) for path in rings]
        self._whole_at_s = time.monotonic() + WHOLE_EVERY_S

    def read(self) -> tuple[list[RankTrace], dict[int, ProcessState | None]]:
        """All rings, and what the processes do that write them."""
        states = {trace.rank: process_of(trace, state) for trace, state in self._heads}
        read = [read_ring(path)[0] for path in self._rings]  # behind that: what has ended writes no more
        return [self._bend(trace) if self._bend else trace for trace in read], states

    def look(self) -> Seen:
        """What is to be seen now."""
        traces, states = self.read()
        self._starved = {trace.rank: self._queues.look(trace.pid) for trace in traces}
        context = self._job.context = self._known(states)
        seen = self._job.join([watch.summarise(trace) for watch, trace in zip(self._watches, traces, strict=True)])
        found = Seen(seen.findings, "windows")
        if seen.suspicious:
            found = Seen(diagnose(traces, context).findings, "suspicion")
        if any(one.kind == kinds.COMMUNICATION_HANG and one.link is None for one in found.findings):
            self._asked += 1
            self._look_at_links(traces)
            return found if self._asked > _LOOKS_AT_LINKS else Seen((), "")
        if found.findings or time.monotonic() < self._whole_at_s:
            return found
        self._whole_at_s = time.monotonic() + WHOLE_EVERY_S
        self._look_at_links(traces)
        return Seen((*diagnose(traces, context).findings, *self._links.find_slow(traces)), "rings")

    def _look_at_links(self, traces: Sequence[RankTrace]) -> None:
        rank_of = {trace.pid: trace.rank for trace in traces}
        found = connections_of(list(rank_of))
        self._links.look({rank_of[pid]: of for pid, of in found.items()}, time.monotonic())

    def diagnose(self) -> Diagnosis:
        """What the rings say as they are now."""
        traces, states = self.read()
        return diagnose(traces, self._known(states))

    def _known(self, states: Mapping[int, ProcessState | None]) -> Context:
        return replace(self._context, processes=states, starved=self._starved, cut_links=self._links.cut)
