"""What happened to a run, from its files: steps and events for one viewer, attempts and incidents for all."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

from evermesh.fault.events import Event, read_events
from evermesh.launcher.controller.journal import Entry, read_journal
from evermesh.launcher.dashboard.board import Section
from evermesh.launcher.finite import finite
from evermesh.launcher.lines import Lines
from evermesh.launcher.report.accounting import spans_of
from evermesh.launcher.report.incidents import incidents_of
from evermesh.launcher.run_directory import Run

_MOST_LINES = 4000
"""Of steps, and of events, in one message: so the first ones are seen before the last are read."""
_MOST_SPANS, _MOST_INCIDENTS, _MOST_MOMENTS = 500, 100, 30
_WITH_FIELDS = ("checkpoint", "checkpoint failed")
"""Kinds of events whose numbers the page shows; those of others would be most of what is sent."""


class News(NamedTuple):
    """What was written since the last time."""

    steps: Sequence[Sequence[Any]]
    """Each as ``point_of`` makes it."""
    events: Sequence[Mapping[str, Any]]
    has_more: bool
    """There was more than goes into one message."""


class Reader(Protocol):
    """Reads on in what happened to a run."""

    def read_on(self) -> News:
        """What was written since the last call; from the beginning at the first."""


class FileReader:
    """Reads the files of ``run``, for one viewer. Not for several threads at once."""

    def __init__(self, run: Run) -> None:
        self._steps, self._events = (Lines(path, from_start=True) for path in (run.telemetry, run.events))

    def read_on(self) -> News:
        """What was written since the last call."""
        steps = list(islice(self._steps.new(), _MOST_LINES))
        events = list(islice(self._events.new(), _MOST_LINES))
        has_more = max(len(steps), len(events)) == _MOST_LINES
        return News([point_of(json.loads(line)) for line in steps], list(_events(events)), has_more)


def point_of(report: Mapping[str, Any]) -> list[Any]:
    """Of the report of a step: step, loss, tokens per second, and the workers that trained it."""
    tokens_per_s = report["num_tokens"] / report["step_s"] if report["step_s"] > 0 else None
    return [report["step"], finite(report["loss"]), finite(tokens_per_s), report["workers"]]


def event_of(event: Mapping[str, Any]) -> dict[str, Any]:
    """Of a line of the event log: what the page shows of it."""
    shown = {name: event.get(name) for name in ("time_s", "kind", "step", "text")}
    return shown | ({"fields": finite(event["fields"])} if event["kind"] in _WITH_FIELDS else {})


def recovery_of(run: Run) -> Section:
    """Attempts and incidents of ``run``: ``spans`` of states as [state, begin, end, attempt], wall clock, in seconds, the end
    of the last None as long as it lasts; ``incidents``; ``omitted``, how many of them are too old to be shown."""
    events = list(read_events(run.events)) if run.events.is_file() else []
    return recovery_from(read_journal(run.journal), events)


def recovery_from(entries: Sequence[Entry], events: Sequence[Event]) -> Section:
    """The same from the entries of a journal and the events."""
    spans = spans_of(entries, float("inf"))
    incidents = incidents_of(entries, events)
    return {
        "spans": [[span.state, span.begin_s, finite(span.end_s), span.generation] for span in spans[-_MOST_SPANS:]],
        "incidents": [
            {**incident.model_dump(mode="json"), "story": incident.model_dump(mode="json")["story"][:_MOST_MOMENTS]}
            for incident in incidents[-_MOST_INCIDENTS:]
        ],
        "omitted": max(0, len(incidents) - _MOST_INCIDENTS),
    }


def _events(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield event_of(json.loads(line))
        except (ValueError, KeyError, TypeError):  # what a killed writer left torn
            continue
