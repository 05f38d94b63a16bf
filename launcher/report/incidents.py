"""What happened to a run: every end of an attempt that nobody asked for, from its cause to the next step.

What became of nodes that were isolated without such an end is in ``isolated``.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from evermesh.fault.events import Event
from evermesh.launcher.controller.journal import Entry
from evermesh.launcher.controller.status import ENDED
from evermesh.launcher.report.accounting import Step

BEFORE = (
    "injected",
    "finding",
    "health",
    "isolation",
    "node refused",
    "node cut off",
    "node lost",
    "keeper lost",
    "skipped",
    "snapshot damaged",
)
"""Kinds of events that tell how it came, of the same attempt."""
BEFORE_S = 60.0
_QUIET = ("checkpoint", "saved", "layouts ranked", "memory", "compiled", "cost model")
"""Kinds that belong to no story."""
_RATED = 32
"""Steps that throughput is taken from, at most."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Moment(_Frozen):
    """A line of a story."""

    after_s: float
    """Since the incident was decided upon; before it: less than 0."""
    kind: str
    text: str


class Incident(_Frozen):
    """One attempt that ended before the job did, or one node that the job has isolated."""

    kind: Literal["failure", "isolation"] = "failure"
    time_s: float
    """When the controller decided; wall clock, seconds since 1970."""
    attempt: int
    node: str | None = None
    """That was isolated."""
    cause: str
    until_training_s: float | None = None
    """Until a step was finished again; None: none was."""
    phases: tuple[tuple[str, float], ...] = ()
    """States in between with their seconds."""
    steps_lost: int = 0
    source: str | None = None
    """Where the state came from: ``memory`` or ``storage``."""
    outcome: str
    """In words."""
    throughput: tuple[tuple[str, float], ...] = ()
    """Tokens per second before, meanwhile and after, as medians of steps; what had no step is left out."""
    story: tuple[Moment, ...] = ()


def incidents_of(entries: Sequence[Entry], events: Sequence[Event], steps: Sequence[Step] = ()) -> tuple[Incident, ...]:
    """All attempts that ended before the job did, in their order."""
    moves = [entry for entry in entries if entry.kind == "transition"]
    starts = [number for number, entry in enumerate(moves) if _begins(moves, number)]
    return tuple(_incident(moves, number, entries, events, steps) for number in starts)


def placing(entries: Sequence[Entry], time_s: float, until_s: float) -> Iterator[Moment]:
    """Who came, and who took which places, between two times."""
    nodes: Sequence[str] = ()
    for entry in entries:
        is_told = time_s <= entry.time_s <= until_s
        if entry.kind == "node" and is_told:
            yield Moment(
                after_s=entry.time_s - time_s, kind="node joined", text=f"{entry.fields['node']}: {entry.reason}"
            )
        if entry.kind == "attempt":
            before, nodes = nodes, _names(entry.fields["nodes"])
            if is_told:
                yield Moment(after_s=entry.time_s - time_s, kind="placed", text=_told_places(before, nodes))


def throughput(steps: Sequence[Step], spans: Sequence[tuple[str, float, float]]) -> tuple[tuple[str, float], ...]:
    """Median tokens per second of the steps that began and ended in each of these spans of the clock on the wall: of the
    last ones in those that end, of the first ones in those that do not."""
    found = []
    for name, begin_s, end_s in spans:
        rates = [step.report.tokens_per_s for step in steps if begin_s <= step.begin_s and step.report.ended_s <= end_s]
        if rates:
            found.append((name, statistics.median(rates[:_RATED] if end_s == float("inf") else rates[-_RATED:])))
    return tuple(found)


def _names(value: object) -> Sequence[str]:
    return [str(name) for name in value] if isinstance(value, list) else []


def _told_places(before: Sequence[str], nodes: Sequence[str]) -> str:
    new = [(name, old) for name, old in zip(nodes, before, strict=False) if name not in before and old not in nodes]
    told = "".join(f"; {name} has the place of {old}" for name, old in new)
    return f"ranks on {', '.join(nodes)}{told}"


def _begins(moves: Sequence[Entry], number: int) -> bool:
    """Whether ranks are ended, or a job that trained gives up, by this transition."""
    entry, origin = moves[number], str(moves[number].fields.get("from", ""))
    to = str(entry.fields["to"])
    if to == "recovering":
        return origin != "recovering"
    return to == "failed" and origin in ("placing", "starting", "training")


def _incident(
    moves: Sequence[Entry], number: int, entries: Sequence[Entry], events: Sequence[Event], steps: Sequence[Step]
) -> Incident:
    first, phases, end = moves[number], [], None
    for entry, after in zip(moves[number:], [*moves[number + 1 :], None], strict=True):
        state = str(entry.fields["to"])
        if state == "training" or state in ENDED:
            end = entry
            break
        if after is not None:
            phases.append((state, after.time_s - entry.time_s))
    is_training = end is not None and end.fields["to"] == "training"
    until_s = end.time_s if end is not None else float("inf")
    told = next(
        (event for event in events if event.kind == "restarted" and first.time_s <= event.time_s <= until_s), None
    )
    lost = told.fields.get("lost_steps", 0) if told is not None else 0
    return Incident(
        time_s=first.time_s,
        attempt=first.generation,
        cause=first.reason,
        until_training_s=end.time_s - first.time_s if end is not None and is_training else None,
        phases=tuple(phases),
        steps_lost=int(str(lost)),
        source=str(told.fields["source"]) if told is not None and "source" in told.fields else None,
        outcome=_outcome(end),
        throughput=throughput(steps, (("before", 0.0, first.time_s), ("after", until_s, float("inf")))),
        story=tuple(_story(first.time_s, until_s, entries, events)),
    )


def _outcome(end: Entry | None) -> str:
    if end is None:
        return "not over yet"
    if end.fields["to"] == "training":
        return "trains again"
    return f"{end.fields['to']}: {end.reason}"


def _story(time_s: float, until_s: float, entries: Sequence[Entry], events: Sequence[Event]) -> list[Moment]:
    found = list(placing(entries, time_s, until_s))
    for event in events:
        is_before = time_s - BEFORE_S <= event.time_s < time_s and event.kind in BEFORE
        if is_before or (time_s <= event.time_s <= until_s and event.kind not in _QUIET):
            found.append(Moment(after_s=event.time_s - time_s, kind=event.kind, text=event.text))
    return sorted(found, key=lambda moment: moment.after_s)
