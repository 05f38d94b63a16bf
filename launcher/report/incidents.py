"""What happened to a run: every end of an attempt that nobody asked for, from its cause to the next step."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from evermesh.fault.events import Event
from evermesh.launcher.controller.journal import Entry
from evermesh.launcher.controller.status import ENDED

_BEFORE = (
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
_BEFORE_S = 60.0
_QUIET = ("checkpoint", "saved", "layouts ranked", "memory", "compiled", "cost model")
"""Kinds that belong to no story."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Moment(_Frozen):
    """A line of a story."""

    after_s: float
    """Since the incident was decided upon; before it: less than 0."""
    kind: str
    text: str


class Incident(_Frozen):
    """One attempt that ended before the job did."""

    time_s: float
    """When the controller decided that it was over; wall clock, seconds since 1970."""
    attempt: int
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
    story: tuple[Moment, ...] = ()


def incidents_of(entries: Sequence[Entry], events: Sequence[Event]) -> tuple[Incident, ...]:
    """All incidents, in their order."""
    moves = [entry for entry in entries if entry.kind == "transition"]
    starts = [number for number, entry in enumerate(moves) if _begins(moves, number)]
    return tuple(_incident(moves, number, events) for number in starts)


def _begins(moves: Sequence[Entry], number: int) -> bool:
    """Whether ranks are ended, or a job that trained gives up, by this transition."""
    entry, origin = moves[number], str(moves[number].fields.get("from", ""))
    to = str(entry.fields["to"])
    if to == "recovering":
        return origin != "recovering"
    return to == "failed" and origin in ("placing", "starting", "training")


def _incident(moves: Sequence[Entry], number: int, events: Sequence[Event]) -> Incident:
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
        story=tuple(_story(first.time_s, until_s, events)),
    )


def _outcome(end: Entry | None) -> str:
    if end is None:
        return "not over yet"
    if end.fields["to"] == "training":
        return "trains again"
    return f"{end.fields['to']}: {end.reason}"


def _story(time_s: float, until_s: float, events: Sequence[Event]) -> list[Moment]:
    found = []
    for event in events:
        is_before = time_s - _BEFORE_S <= event.time_s < time_s and event.kind in _BEFORE
        if is_before or (time_s <= event.time_s <= until_s and event.kind not in _QUIET):
            found.append(Moment(after_s=event.time_s - time_s, kind=event.kind, text=event.text))
    return found
