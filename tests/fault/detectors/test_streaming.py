"""Summaries of windows, joined, against all records at once."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from evermesh.fault.detectors import Context, diagnose, kernels, kinds
from evermesh.fault.detectors.joining import join, survey
from evermesh.fault.detectors.streaming import JobWatch, Seen
from evermesh.fault.detectors.summaries import RankSummary, RankWatch
from evermesh.fault.recorder.trace import RankTrace
from evermesh.fault.synthetic import JobShape, generate
from evermesh.fault.synthetic.faults import CommunicationHang, Fault, Hang, Mismatch, Pauses, SlowRank
from evermesh.fault.synthetic.generating import BEGIN_NS
from tests.fault.detectors.windows import cut

_WINDOWS = 9


def _watch(
    traces: Sequence[RankTrace], capacity: int = 100_000, starved: Mapping[int, float] | None = None
) -> tuple[Seen, list[list[RankSummary]]]:
    """Look at the rings of a job in windows; what the last one says, and all summaries. ``starved``: in all but the last."""
    watches, job, told = [RankWatch() for _ in traces], JobWatch(), []
    end_ns = max(trace.read_ns for trace in traces)
    for at_ns in np.linspace(BEGIN_NS + 10**6, end_ns, _WINDOWS).astype(np.int64).tolist():
        cuts = [cut(trace, at_ns, capacity) for trace in traces]
        told.append([watch.summarise(cut) for watch, cut in zip(watches, cuts, strict=True)])
        job.context = Context(starved=starved if starved and at_ns < end_ns else {})
        seen = job.join(told[-1])
    return seen, told


_SHAPE = JobShape(dp=4, tp=2, pp=2)


@pytest.mark.parametrize(
    "fault", [None, Hang(5, 6), Hang(5, 6, nth=0, phase="data"), CommunicationHang(2, 6), SlowRank(3, 1.6)]
)
def test_windows_say_what_all_records_say(fault: Fault | None) -> None:
    traces = generate(_SHAPE, [fault] if fault is not None else []).traces
    seen, told = _watch(traces)
    assert [(one.kind, one.rank, one.group) for one in seen.findings] == [
        (one.kind, one.rank, one.group) for one in diagnose(traces).findings
    ]
    counted = sum(one.num_records for window in told for one in window)
    is_open = sum(one.opened >= 0 for one in told[-1])
    assert counted + is_open == sum(len(trace.records) for trace in traces)


def test_steps_are_those_of_a_survey_of_all_records() -> None:
    traces = generate(_SHAPE, seed=4).traces
    watches, job = [RankWatch() for _ in traces], JobWatch()
    for at_ns in np.linspace(BEGIN_NS + 10**6, traces[0].read_ns, 23).astype(np.int64).tolist():
        summaries = [watch.summarise(cut(trace, at_ns, 10_000)) for watch, trace in zip(watches, traces, strict=True)]
        job.join(summaries)
    joined = join(traces)
    whole, windows = survey(joined), job._survey(np.full(len(traces), -1))
    assert whole.first_step == windows.first_step
    np.testing.assert_array_equal(whole.of_step, windows.of_step)
    np.testing.assert_array_equal(whole.signatures, windows.signatures)
    np.testing.assert_array_equal(whole.of_slot, windows.of_slot)


@pytest.mark.parametrize(("steps", "is_patient"), [(60, True), (120, True), (200, False)])
def test_a_job_that_once_stood_still_is_watched_with_patience_for_a_while_not_for_good(
    steps: int, is_patient: bool
) -> None:
    traces = generate(JobShape(dp=2, steps=steps)).traces
    for trace in traces:
        for name in ("entered_ns", "ended_ns"):
            trace.records[name][trace.records["step"] > 20] += np.uint64(20 * 10**9)
    columns = [kernels.LONGEST_NS, kernels.BEFORE_NS]
    assert (survey(join(traces)).of_slot[:, columns].max() > 20e9) == is_patient


def test_pauses_that_a_rank_had_while_it_waited_for_a_processor_are_none_of_its_own() -> None:
    traces = generate(JobShape(dp=4, steps=48), [Pauses(2, 0.05)]).traces
    assert [(one.kind, one.rank) for one in _watch(traces)[0].findings] == [(kinds.SLOW_RANK, 2)]
    assert not _watch(traces, starved={2: 0.4})[0].findings
    assert [one.rank for one in _watch(traces, starved={1: 0.4})[0].findings] == [2], (
        "of another rank that explains nothing"
    )
    assert [one.rank for one in _watch(traces, starved={2: 0.01})[0].findings] == [2], "nor so little"


def test_ranks_that_disagree_are_suspicious_and_their_rings_say_who_strays() -> None:
    traces = generate(_SHAPE, [Mismatch(3, 6, num_bytes=4096)]).traces
    seen, _ = _watch(traces)
    assert 3 in seen.suspicious
    finding = diagnose([trace for trace in traces if trace.rank in seen.suspicious]).findings[0]
    assert (finding.kind, finding.rank) == (kinds.SIZE_MISMATCH, 3)
    assert not _watch(generate(_SHAPE).traces)[0].suspicious


def test_what_was_overwritten_unread_is_counted_and_nobody_is_blamed() -> None:
    seen, told = _watch(generate(replace(_SHAPE, steps=40)).traces, capacity=60)
    assert sum(one.num_lost for window in told for one in window) > 0
    assert not seen.findings
    assert not seen.suspicious
