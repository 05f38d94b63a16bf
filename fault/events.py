"""Findings, decisions, and the one structured event log of a job.

A detector concludes a :class:`Finding`; a policy answers with a :data:`Decision` that carries its reason; whatever
happens is an :class:`Event`, one JSON object per line of the log. All are frozen and serialised as JSON
(``model_dump_json``/``model_validate_json``); readers refuse unknown fields.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from evermesh.fault.errors import EventLogUnusable
from evermesh.parallelism.collectives import Phase

UNREADABLE = "unreadable"
"""Kind of the event that stands for a line that is none."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Finding(_Frozen):
    """What a detector concluded."""

    kind: str
    """What is wrong, such as ``hang`` or ``slow link``."""
    node: str | None = None
    rank: int | None = None
    link: tuple[int, int] | None = None
    """The two ranks of a link, lower first; of one that is slow in one direction only, ``evidence`` tells which."""
    group: str | None = None
    """Process group in which it was seen."""
    step: int | None = None
    text: str = ""
    """The finding in one sentence."""
    evidence: dict[str, JsonValue] = Field(default_factory=dict)
    """The numbers that led to it, by name with unit."""
    confidence: float = Field(ge=0, le=1)
    """Probability that it is true."""


class Continue(_Frozen):
    """Go on as if nothing had happened."""

    kind: Literal["continue"] = "continue"
    reason: str


class Skip(_Frozen):
    """Do not apply the step; its samples are tried again later."""

    kind: Literal["skip"] = "skip"
    reason: str
    step: int


class Restart(_Frozen):
    """Start a new attempt on the same nodes."""

    kind: Literal["restart"] = "restart"
    reason: str


class Isolate(_Frozen):
    """Start a new attempt without some nodes."""

    kind: Literal["isolate"] = "isolate"
    reason: str
    nodes: tuple[str, ...]
    evidence: tuple[Finding, ...] = ()


class Abort(_Frozen):
    """End the job."""

    kind: Literal["abort"] = "abort"
    reason: str


Decision = Annotated[Continue | Skip | Restart | Isolate | Abort, Field(discriminator="kind")]
DecisionAdapter: TypeAdapter[Decision] = TypeAdapter(Decision)


class Event(_Frozen):
    """One line of the event log."""

    time_s: float
    """Wall clock, seconds since 1970."""
    kind: str
    step: int | None = None
    phase: Phase | None = None
    text: str
    """What happened, for a person."""
    fields: dict[str, JsonValue] = Field(default_factory=dict)
    """What happened, for a program; names carry units."""


class EventLog:
    """An append-only file of events, one JSON object per line.

    Every line is one ``write`` on a descriptor opened for appending, so several processes may share a file. A context
    manager.

    Raises:
        EventLogUnusable: the file cannot be opened, or later, a line cannot be written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._end_torn_line()
        except OSError as error:
            raise EventLogUnusable(self.path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(
        self, kind: str, text: str, *, step: int | None = None, phase: Phase | None = None, **fields: JsonValue
    ) -> Event:
        """Append an event that happened now, and return it."""
        event = Event(time_s=time.time(), kind=kind, step=step, phase=phase, text=text, fields=fields)
        self._append(event.model_dump_json().encode() + b"\n")
        return event

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _append(self, line: bytes) -> None:
        try:
            written = os.write(self._descriptor, line)
        except OSError as error:
            raise EventLogUnusable(self.path, error) from error
        if written != len(line):
            fact = OSError(f"only {written} of {len(line)} bytes were taken")
            raise EventLogUnusable(self.path, fact) from fact

    def _end_torn_line(self) -> None:
        """End the line that a killed writer left, so that the next event starts its own."""
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            os.write(self._descriptor, b"\n")


def read_events(path: Path | str) -> Iterator[Event]:
    """Yield the events of a log, oldest first. An unfinished last line is being written, and is left out.

    A line in the middle that a killed writer left torn is yielded as an event of kind ``unreadable`` with its text.
    """
    time_s = 0.0
    with Path(path).open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or not line.strip():
                continue
            event = _parse(line, time_s)
            time_s = event.time_s
            yield event


def _parse(line: bytes, time_s: float) -> Event:
    try:
        return Event.model_validate_json(line)
    except ValidationError:
        return Event(time_s=time_s, kind=UNREADABLE, text=line.decode(errors="replace").rstrip("\n"))
