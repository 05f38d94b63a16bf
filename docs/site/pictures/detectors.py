"""Records of collectives with a fault in them, and the sentence that the detectors make of them."""

import textwrap
from collections.abc import Sequence
from typing import Any

from docs.site.pictures.drawing import COLOURS, INK, figure, png
from evermesh.fault.detectors import diagnose
from evermesh.fault.recorder.trace import RankTrace
from evermesh.fault.synthetic import JobShape, generate
from evermesh.fault.synthetic.faults import Fault, Hang, SlowRank

_SHAPE = JobShape(dp=6, ranks_per_node=3, layer_s=4e-3)
_WIDTH = 120


def hang() -> bytes:
    """A rank that never enters a sum that the others wait in."""
    return _drawn(Hang(4, 6), "a rank hangs", last_s=0.12, wait_s=0.05)


def slow_rank() -> bytes:
    """A rank that computes longer than the others, which wait for it."""
    return _drawn(SlowRank(2, 1.6, from_step=3), "a rank is slow", last_s=0.22, wait_s=5.0)


def _drawn(fault: Fault, words: str, last_s: float, wait_s: float) -> bytes:
    job = generate(_SHAPE, [fault], seed=1, wait_s=wait_s)
    told = generate(_SHAPE, [fault], seed=1)
    finding = diagnose(told.traces).findings[0]
    made, (axes,) = figure(10, 3.6)
    end_ns = max(int(trace.records["entered_ns"][-1]) for trace in job.traces) + int(
        wait_s * 1e9 if wait_s < 1 else 2e6
    )
    for trace in job.traces:
        _draw_rank(axes, trace, end_ns, is_blamed=trace.rank == finding.rank)
    axes.set_xlim(-last_s * 1e3, 0)
    axes.set_ylim(len(job.traces) - 0.5, -0.5)
    axes.set_yticks(range(len(job.traces)), [f"rank {trace.rank} on {trace.node}" for trace in job.traces])
    axes.set_xlabel("ms. Blue: computes; amber: waits for others in a collective; red: the rank that the finding names")
    axes.spines[["top", "right"]].set_visible(False)
    sentence = textwrap.fill(f"{finding.kind}: {finding.text} ({finding.confidence:.0%} sure)", _WIDTH)
    axes.set_title(f"{words}\n{sentence}", loc="left", fontsize=10, color=INK)
    return png(made)


def _draw_rank(axes: Any, trace: RankTrace, end_ns: int, *, is_blamed: bool) -> None:
    colour = COLOURS[4] if is_blamed else COLOURS[0]
    before_ns = int(trace.records["entered_ns"][0])
    for entered_ns, ended_ns in _spans(trace, end_ns):
        _bar(axes, trace.rank, before_ns - end_ns, entered_ns - end_ns, colour)
        _bar(axes, trace.rank, entered_ns - end_ns, ended_ns - end_ns, COLOURS[2])
        before_ns = ended_ns
    _bar(axes, trace.rank, before_ns - end_ns, 0, colour)


def _spans(trace: RankTrace, end_ns: int) -> Sequence[tuple[int, int]]:
    return [(int(one["entered_ns"]), int(one["ended_ns"]) or end_ns) for one in trace.records]


def _bar(axes: Any, row: int, start_ns: int, stop_ns: int, colour: str) -> None:
    if stop_ns > start_ns:
        axes.barh(row, (stop_ns - start_ns) / 1e6, left=start_ns / 1e6, height=0.7, color=colour)
