"""Findings, decisions and the event log; what detects, records and answers failures; snapshots in host memory.

Names are imported when they are first used, so that the keepers start fast.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evermesh.fault.errors import EventLogUnusable
    from evermesh.fault.events import (
        Abort,
        Continue,
        Decision,
        Event,
        EventLog,
        Finding,
        Isolate,
        Restart,
        Skip,
        read_events,
    )
    from evermesh.parallelism.collectives import Phase

__all__ = [
    "Abort",
    "Continue",
    "Decision",
    "Event",
    "EventLog",
    "EventLogUnusable",
    "Finding",
    "Isolate",
    "Phase",
    "Restart",
    "Skip",
    "read_events",
]
_HOMES = {"EventLogUnusable": "evermesh.fault.errors", "Phase": "evermesh.parallelism.collectives"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES.get(name, "evermesh.fault.events")), name)
    globals()[name] = value
    return value
