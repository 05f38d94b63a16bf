"""Ranks that wait for each other, and which of them left the order that all had."""

from collections.abc import Iterator

from evermesh.fault.detectors import kinds
from evermesh.fault.detectors.joining import Joined, in_step
from evermesh.fault.detectors.programs import Deviation, deviation_of, left_out, majority, name_of
from evermesh.fault.detectors.sentences import MOST_NAMED, operation_of
from evermesh.fault.detectors.standing import Standing
from evermesh.fault.events import Finding

_LIKELY = 0.9


def of_cycle(joined: Joined, standing: Standing, tangled: set[int]) -> Iterator[Finding]:
    """Ranks that wait for each other: one finding, which names who left the order of before, if that is one rank."""
    if not tangled:
        return
    deviating = _deviating(joined, standing, tangled)
    cycle = _cycle(standing, tangled)
    waits = "; ".join(
        f"{joined.where(trace)} is in {operation_of(joined, standing.waiting[trace])}" for trace in cycle[:MOST_NAMED]
    )
    first = standing.waiting[cycle[0]]
    evidence = {
        "cycle": [joined.traces[trace].rank for trace in cycle[:64]],
        "waited_s": round(first.waited_s, 3),
    }
    if len(deviating) != 1:
        text = f"{len(tangled)} ranks wait for each other{in_step(first.step)}: {waits}"
        yield Finding(kind=kinds.DEADLOCK, step=first.step, text=text, evidence={**evidence}, confidence=_LIKELY)
        return
    [one] = deviating
    trace, step = joined.traces[one.trace], standing.waiting[one.trace].step
    found, expected = name_of(joined, one.trace, one.found), name_of(joined, one.trace, one.expected)
    kind, what = {
        "skipped": (kinds.SKIPPED, f"left out {expected}: it went on with {found}"),
        "extra": (kinds.EXTRA, f"did {found} once more than before"),
    }.get(one.kind, (kinds.DEADLOCK, f"entered {found} where {expected} is due"))
    yield Finding(
        kind=kind,
        rank=trace.rank,
        node=joined.node(one.trace),
        group=joined.groups[standing.waiting[one.trace].group].name,
        step=step,
        text=f"{joined.where(one.trace)} {what}{in_step(step)}, and now {len(tangled)} ranks wait for each other: {waits}",
        evidence={**evidence, "expected": expected, "found": found},
        confidence=_LIKELY,
    )


def _deviating(joined: Joined, standing: Standing, tangled: set[int]) -> list[Deviation]:
    traces = sorted(tangled)
    step = max(standing.waiting[trace].step for trace in traces)
    own = [one for trace in traces if (one := _own(joined, trace, standing.waiting[trace].step)) is not None]
    if own:
        return own
    alike = majority(joined, [trace for trace in traces if standing.waiting[trace].step == step], step)
    if alike is None:
        return []
    return [one for trace in traces if (one := deviation_of(joined, trace, step, alike)) is not None]


def _own(joined: Joined, trace: int, step: int) -> Deviation | None:
    """Where a rank leaves what it did before, in the step that it is in, or at the end of the one before."""
    return deviation_of(joined, trace, step) or left_out(joined, trace, step - 1)


def _cycle(standing: Standing, tangled: set[int]) -> list[int]:
    """Ranks each of which waits for the next, and the last for the first."""
    path: list[int] = []
    place: dict[int, int] = {}
    trace = min(tangled)
    while trace not in place:
        place[trace] = len(path)
        path.append(trace)
        following = [other for other in standing.missing[standing.waiting[trace].key] if other in tangled]
        if not following:
            return path
        trace = min(following)
    return path[place[trace] :]
