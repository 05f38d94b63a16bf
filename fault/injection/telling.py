"""Every fault that is injected is an event before it is; what was injected is known from there. Imports no torch."""

from pathlib import Path

from evermesh.fault.events import EventLog, read_events
from evermesh.fault.injection.schedule import Shot

INJECTED = "injected"
"""Kind of the event that is written before a shot is fired, with its number."""


def tell(events: Path, shot: Shot, step: int, pid: int | None, what: str = "") -> None:
    """Write down that ``shot`` is fired now.

    Raises:
        EventLogUnusable: that cannot be written.
    """
    with EventLog(events) as log:
        text = f"{shot}{what and ': '}{what}"
        log.write(INJECTED, text, step=step, shot=shot.number, pid=pid, fault=shot.fault.kind)


def fired_shots(events: Path) -> set[int]:
    """Numbers of the shots that were fired in this run."""
    found = read_events(events) if events.is_file() else ()
    return {int(str(event.fields["shot"])) for event in found if event.kind == INJECTED}
