"""Asking a running job to go on with another layout, and waiting for what becomes of it."""

import time
from collections.abc import Sequence
from typing import Any

from evermesh.fault.events import Event, read_events
from evermesh.launcher import job_yaml
from evermesh.launcher.client import Client
from evermesh.launcher.errors import RelayoutRefused, RunNotFound
from evermesh.launcher.run_directory import Run
from evermesh.parallelism.layout import Layout

_LOOK_S = 0.1
_ANSWERS = ("layout moved", "layout refused")


def read_changes(given: Sequence[str]) -> dict[str, Any]:
    """Fields of a layout from KEY=VALUE.

    Raises:
        RelayoutRefused: something is no field, or no YAML.
    """
    changes = {}
    for change in given:
        name, equals, text = change.partition("=")
        try:
            changes[name.strip()] = job_yaml.value(text)
        except ValueError as error:
            raise RelayoutRefused(f"{change}: {error}. Quote it.") from error
        if not equals or name.strip() not in Layout.model_fields:
            raise RelayoutRefused(
                f"{change} is not KEY=VALUE with a field of train.layout, such as tp=2. Fields: "
                f"{', '.join(Layout.model_fields)}."
            )
    return changes


def change_layout(run: Run, changes: dict[str, Any], *, wait: bool = True) -> str:
    """Have a running job go on with these changes; returns what to tell about it.

    Raises:
        RunNotFound: it does not live, or ended before it could move.
        RelayoutRefused: it cannot run with that layout; it goes on as it is.
        ControllerLost: its controller does not answer.
    """
    if not run.is_alive():
        raise RunNotFound(f"run {run.name} does not live: it is {run.status()}. Resume it with --set train.layout...")
    before = len(_answers(run))
    Client(run).change_layout(changes)
    if not wait:
        return f"asked {run.name} to move; its events tell when it has"
    while run.is_alive():
        if answers := _answers(run)[before:]:
            return _told(run, answers[0])
        time.sleep(_LOOK_S)
    raise RunNotFound(f"run {run.name} ended before it could move: it is {run.status()}.")


def _answers(run: Run) -> list[Event]:
    found = read_events(run.events) if run.events.is_file() else []
    return [event for event in found if event.kind in _ANSWERS]


def _told(run: Run, answer: Event) -> str:
    if answer.kind == "layout refused":
        raise RelayoutRefused(f"{run.name} goes on as it is: {answer.text}")
    return f"{run.name} moved behind step {answer.step}, {answer.text}"
