"""Findings, decisions and the event log; what detects, records and answers failures."""

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
