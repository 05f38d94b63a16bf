"""A timeline as trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Format: the Trace Event Format of Chromium, the JSON object form with complete events ("X") and metadata ("M"); times in
microseconds. A node is a process, a rank a thread in it; both are numbered from 1, because viewers take 0 for the idle task.
"""

import json
from collections.abc import Iterator
from typing import Any

from evermesh.parallelism.simulator.timeline import Span, Timeline

_MOST_SEQUENCES = 32
"""Named in one slice; more are counted only."""


def chrome_trace(timeline: Timeline) -> bytes:
    """The trace of ``timeline``: a slice for every micro-batch or pass, and apart from them a slice for every wait."""
    events = [*_names(timeline), *_slices(timeline)]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":")).encode()


def _node(timeline: Timeline, rank: int) -> int:
    return timeline.nodes[rank] if timeline.nodes else 0


def _place(timeline: Timeline, rank: int) -> dict[str, int]:
    return {"pid": _node(timeline, rank) + 1, "tid": rank + 1}


def _names(timeline: Timeline) -> Iterator[dict[str, Any]]:
    named: set[int] = set()
    for rank, label in enumerate(timeline.labels):
        place = _place(timeline, rank)
        if place["pid"] not in named:
            named.add(place["pid"])
            yield {"ph": "M", "name": "process_name", **place, "args": {"name": f"node {place['pid'] - 1}"}}
            yield {"ph": "M", "name": "process_sort_index", **place, "args": {"sort_index": place["pid"]}}
        yield {"ph": "M", "name": "thread_name", **place, "args": {"name": label}}
        yield {"ph": "M", "name": "thread_sort_index", **place, "args": {"sort_index": rank}}


def _slices(timeline: Timeline) -> Iterator[dict[str, Any]]:
    for span in timeline.spans:
        place = _place(timeline, span.rank)
        busy_until = span.stop_s - span.waited_s
        yield {
            "ph": "X",
            "name": _name(span),
            "cat": "backward" if span.is_backward else "work",
            **place,
            **_times(span.start_s, busy_until),
            "args": {
                "micro-batch": span.micro_batch,
                "sequences": list(span.sequences[:_MOST_SEQUENCES]),
                "number of sequences": len(span.sequences),
                "ring": span.ring_size,
                "tokens": span.num_tokens,
                **({"cut off": True} if span.is_cut_off else {}),
            },
        }
        if span.waited_s > 0:
            # where inside the span is not recorded: the waits of all layers together stand at its end
            yield _wait(place, "ring partner", busy_until, span.stop_s, {})
    for wait in timeline.waits:
        place = _place(timeline, wait.rank)
        yield _wait(place, wait.cause, wait.start_s, wait.stop_s, {"for": timeline.labels[wait.for_rank]})


def _wait(place: dict[str, int], cause: str, start_s: float, stop_s: float, args: dict[str, str]) -> dict[str, Any]:
    return {"ph": "X", "name": f"waits: {cause}", "cat": "wait", **place, **_times(start_s, stop_s), "args": args}


def _times(start_s: float, stop_s: float) -> dict[str, float]:
    return {"ts": start_s * 1e6, "dur": max(0.0, stop_s - start_s) * 1e6}


def _name(span: Span) -> str:
    if span.ring_size > 1:
        longest = f"ring of {span.ring_size}"
        return f"sequence {span.sequences[0]}, {longest}" if len(span.sequences) == 1 else f"pack, {longest}"
    if not span.sequences:
        return "no tokens"
    return f"sequence {span.sequences[0]}" if len(span.sequences) == 1 else f"{len(span.sequences)} sequences"
