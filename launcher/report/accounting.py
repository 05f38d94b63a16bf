"""Where the wall time of a run went: every second counts once."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from evermesh.launcher.controller.journal import Entry
from evermesh.launcher.controller.status import ENDED, JobState
from evermesh.runtime.telemetry import StepReport

_WITH_STEPS: tuple[JobState, ...] = ("starting", "training", "regrouping", "stopping")
"""States in which ranks may finish steps: the first step of an attempt ends its starting."""
_REST = {
    "placing": "waiting for nodes to join",
    "waiting": "waiting for lost nodes",
    "recovering": "recovering: until the ranks of an attempt are gone",
    "training": "between steps",
    "regrouping": "leaving the state for another number of nodes",
    "stopping": "saving at the end",
}
COUNTED = "training, steps that count"
AGAIN = "training, steps that were lost and trained again"
SKIPPED = "training, steps whose update was skipped"
PLANS, CHECKPOINTS, SNAPSHOTS = "waiting for plans", "standing still for checkpoints", "standing still for snapshots"
FIRST_START, LATER_START = "starting ranks, first attempt", "starting ranks again"


class Span(NamedTuple):
    """A job in one state."""

    state: str
    begin_s: float
    end_s: float
    """Both wall clock, seconds since 1970."""
    generation: int
    is_first: bool
    """No rank of this launch has finished a step before."""

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


class Step(NamedTuple):
    """A step that was trained, and whether it counts."""

    report: StepReport
    is_lost: bool
    """It was trained again later."""

    @property
    def begin_s(self) -> float:
        return self.report.ended_s - self.report.step_s


def spans_of(entries: Iterable[Entry], now_s: float) -> list[Span]:
    """The states of a job one after another, by its journal; ``now_s`` ends the last one if the job lives.

    Between the end of a launch and the next one there is no span.
    """
    found: list[Span] = []
    state, begin_s, generation, is_first, last_s = "", 0.0, 0, True, 0.0
    for entry in entries:
        last_s = entry.time_s
        if entry.kind == "launch":
            state, begin_s, generation, is_first = "placing", entry.time_s, entry.generation, True
        elif entry.kind == "transition":
            if state:
                found.append(Span(state, begin_s, max(begin_s, entry.time_s), generation, is_first))
            state = str(entry.fields["to"])
            begin_s, generation = entry.time_s, entry.generation
            is_first = is_first and state != "training"
            if state in ENDED:
                state = ""
    if state:
        found.append(Span(state, begin_s, max(begin_s, now_s, last_s), generation, is_first))
    return found


def steps_of(reports: Sequence[StepReport]) -> list[Step]:
    """All steps that were trained, in that order: of those of one number the last one counts."""
    found: list[Step] = []
    lowest = float("inf")
    for report in reversed(reports):
        found.append(Step(report, report.step >= lowest))
        lowest = min(lowest, report.step)
    return found[::-1]


def parts_of(spans: Sequence[Span], steps: Sequence[Step]) -> dict[str, float]:
    """Seconds by what they were spent on, largest first; together they are those of all spans."""
    found: dict[str, float] = {}
    inside = _inside(spans, steps)
    for span, seconds_of_steps in zip(spans, inside, strict=True):
        _add(found, _name_of_rest(span), span.seconds - seconds_of_steps)
    scale = sum(inside) / total if (total := sum(step.report.step_s for step in steps)) else 0.0
    for step in steps:
        for name, seconds in _parts_of_step(step):
            _add(found, name, seconds * scale)
    return dict(sorted(((name, seconds) for name, seconds in found.items() if seconds > 0), key=lambda part: -part[1]))


def _inside(spans: Sequence[Span], steps: Sequence[Step]) -> list[float]:
    """By span: seconds that lie in steps. A step does not end later than the next one begins."""
    found = [0.0] * len(spans)
    until_s, first = 0.0, 0
    for step in steps:
        begin_s, end_s = max(step.begin_s, until_s), step.report.ended_s
        until_s = max(until_s, end_s)
        while first < len(spans) and spans[first].end_s <= begin_s:
            first += 1
        for number in range(first, len(spans)):
            span = spans[number]
            if span.begin_s >= end_s:
                break
            if span.state in _WITH_STEPS:
                found[number] += max(0.0, min(end_s, span.end_s) - max(begin_s, span.begin_s))
    return found


def _parts_of_step(step: Step) -> Iterator[tuple[str, float]]:
    report = step.report
    if step.is_lost:
        yield AGAIN, report.step_s
        return
    waits = (
        (PLANS, report.plan_wait_s),
        (CHECKPOINTS, report.checkpoint_stop_s),
        (SNAPSHOTS, report.snapshot.stop_s),
    )
    yield from waits
    rest_s = max(0.0, report.step_s - sum(seconds for _, seconds in waits))
    yield (COUNTED if report.committed else SKIPPED), rest_s


def _name_of_rest(span: Span) -> str:
    if span.state == "starting":
        return FIRST_START if span.is_first else LATER_START
    return _REST.get(span.state, span.state)


def _add(found: dict[str, float], name: str, seconds: float) -> None:
    found[name] = found.get(name, 0.0) + seconds
