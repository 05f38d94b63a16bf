"""A watcher outside of the ranks: it reads their rings as agents do, and joins what it read as a controller does."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evermesh.fault.detectors import Context, Diagnosis, diagnose
from evermesh.fault.detectors.streaming import JobWatch
from evermesh.fault.detectors.summaries import RankWatch
from evermesh.fault.events import Finding
from evermesh.fault.process_state import ProcessState
from evermesh.fault.recorder.reader import process_of, read_ring
from evermesh.fault.recorder.trace import RankTrace

PERIOD_S, WHOLE_EVERY_S = 0.1, 2.0
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
        self._whole_at_s = time.monotonic() + WHOLE_EVERY_S

    def read(self) -> tuple[list[RankTrace], dict[int, ProcessState | None]]:
        """All rings, and what the processes do that write them."""
        read = [read_ring(path) for path in self._rings]
        states = {trace.rank: process_of(trace, state) for trace, state in read}
        return [self._bend(trace) if self._bend else trace for trace, _ in read], states

    def look(self) -> Seen:
        """What is to be seen now."""
        traces, states = self.read()
        self._job.context = context = replace(self._context, processes=states)
        seen = self._job.join([watch.summarise(trace) for watch, trace in zip(self._watches, traces, strict=True)])
        if seen.suspicious:
            return Seen(diagnose(traces, context).findings, "suspicion")
        if seen.findings or time.monotonic() < self._whole_at_s:
            return Seen(seen.findings, "windows")
        self._whole_at_s = time.monotonic() + WHOLE_EVERY_S
        return Seen(diagnose(traces, context).findings, "rings")

    def diagnose(self) -> Diagnosis:
        """What the rings say as they are now."""
        traces, states = self.read()
        return diagnose(traces, replace(self._context, processes=states))
