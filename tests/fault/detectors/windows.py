"""The rings of a synthetic job, looked at in windows as agents do, and joined as the controller does."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from evermesh.fault.detectors import Context
from evermesh.fault.detectors.streaming import JobWatch, Seen
from evermesh.fault.detectors.summaries import RankSummary, RankWatch
from evermesh.fault.recorder.trace import RankTrace
from evermesh.fault.synthetic.generating import BEGIN_NS


def cut(trace: RankTrace, at_ns: int, capacity: int = 100_000) -> RankTrace:
    """What the ring held at a moment."""
    records = trace.records[trace.records["entered_ns"] <= at_ns][-capacity:].copy()
    records["ended_ns"][records["ended_ns"] > at_ns] = 0
    return replace(trace, records=records, read_ns=at_ns)


def watched(
    traces: Sequence[RankTrace],
    context: Context | None = None,
    *,
    windows: int = 16,
    told: Callable[[list[RankSummary]], list[RankSummary]] = list,
) -> Iterator[Seen]:
    """What is said in every window; ``told``: what becomes of summaries on their way."""
    watches, job = [RankWatch() for _ in traces], JobWatch(context)
    end_ns = max(trace.read_ns for trace in traces)
    for at_ns in np.linspace(BEGIN_NS + 10**6, end_ns, windows).astype(np.int64).tolist():
        summaries = [watch.summarise(cut(trace, at_ns)) for watch, trace in zip(watches, traces, strict=True)]
        yield job.join(told(summaries))
