"""Reads a schedule of faults from YAML or JSON; every problem is reported with its key and its line."""

from pathlib import Path

from pydantic import ValidationError

from evermesh.fault.errors import ScheduleInvalid
from evermesh.fault.injection import Schedule
from evermesh.launcher import job_yaml
from evermesh.launcher.job_yaml import Key, dotted


def read_schedule(path: Path) -> tuple[Schedule, dict[Key, int]]:
    """The schedule of a file, and the line of every key.

    Raises:
        JobFileInvalid: it is no YAML mapping.
        ScheduleInvalid: it is no schedule.
    """
    values, lines = job_yaml.read(path)
    try:
        return Schedule.model_validate(values), lines
    except ValidationError as error:
        # a fault that is refused also makes its list "too short": only the fault is worth a line
        details = [found for found in error.errors() if found["type"] != "too_short" or not found["input"]]
        found = [(_place(path, lines, _key(one["loc"])), _text(one["msg"])) for one in details]
        raise ScheduleInvalid(found) from error


def with_lines(error: ScheduleInvalid, path: Path, lines: dict[Key, int]) -> ScheduleInvalid:
    """What does not fit a run, with the lines of the file."""
    keys = [
        (tuple(int(part) if part.isdecimal() else part for part in key.split(".")), text)
        for key, text in error.problems
    ]
    return ScheduleInvalid([(_place(path, lines, key), text) for key, text in keys])


def _key(location: tuple[int | str, ...]) -> Key:
    """Pydantic's location without the branches that it names: the kind of a fault, the unit of a moment."""
    kept = list(location)
    if len(kept) > 2 and kept[0] == "faults":
        del kept[2]
    if len(kept) > 3 and kept[2] == "at":
        del kept[3]
    return tuple(kept)


def _place(path: Path, lines: dict[Key, int], key: Key) -> str:
    """``FILE:LINE: KEY``, of the nearest key that the file has."""
    found = next((lines[key[:depth]] for depth in range(len(key), 0, -1) if key[:depth] in lines), 1)
    return f"{path}:{found}: {dotted(key)}"


def _text(message: str) -> str:
    return message.removeprefix("Value error, ")
