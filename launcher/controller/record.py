"""What a controller that was killed finds out about its job from the journal."""

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evermesh.fault.cluster.records import Evidence
from evermesh.launcher.controller.journal import Entry
from evermesh.launcher.controller.machine import Stop
from evermesh.launcher.controller.status import JobState
from evermesh.launcher.policy import FailedAttempt


@dataclass(frozen=True, slots=True)
class Drained:
    """A node that the job is to leave, or has left."""

    because: str
    since_s: float
    """Wall clock, seconds since 1970."""
    by: str | None = None
    """Who wanted that; None: the policy."""


@dataclass(frozen=True, slots=True)
class Slowed:
    """A node whose ranks have less to do."""

    slowdown: float
    """How many times as long as others they were found to take."""
    since_s: float
    """Wall clock, seconds since 1970."""


@dataclass(slots=True)
class Record:
    """The job as the journal tells it, since the last launch."""

    state: JobState = "placing"
    reason: str = "launched"
    generation: int = 0
    history: list[FailedAttempt] = field(default_factory=list)
    attempt_nodes: tuple[str, ...] = ()
    """Of the last attempt; empty before the first one of this launch."""
    began_at: int | None = None
    """Step of the newest checkpoint or snapshot when it began."""
    is_counted: bool = False
    """The last attempt is in the history."""
    is_ending: bool = False
    """Its ranks have been told to end."""
    has_stepped: bool = False
    """It has finished a step."""
    exit_code: int | None = None
    """Of the final states."""
    stop: Stop | None = None
    term: int = 0
    """Of the controller; 0 where nobody could take over."""
    pids: dict[str, int] = field(default_factory=dict)
    """Agents by node."""
    drained: dict[str, Drained] = field(default_factory=dict)
    """Nodes that the job is to leave."""
    evidence: list[Evidence] = field(default_factory=list)
    """What speaks against nodes, as the job has seen it: the cluster store may be away."""
    slowed: dict[str, Slowed] = field(default_factory=dict)
    """Nodes whose share is degraded."""
    isolated_s: list[float] = field(default_factory=list)
    """When the job has set nodes aside by itself, seconds since 1970."""
    started_s: float = field(default_factory=time.time)


def replay(entries: Sequence[Entry]) -> Record:
    """The job after ``entries``, which end anywhere."""
    record = Record()
    for entry in entries:
        if entry.kind == "launch":
            record = Record(started_s=entry.time_s)
        record.generation = entry.generation
        _apply(record, entry)
    return record


def _apply(record: Record, entry: Entry) -> None:
    fields: Mapping[str, Any] = entry.fields
    match entry.kind:
        case "transition" if fields["to"] != "starting":
            record.state, record.reason = fields["to"], entry.reason
            record.exit_code = fields["exit_code"]
            record.is_ending = record.is_ending or bool(fields["ends_ranks"])
            record.has_stepped = record.has_stepped or fields["to"] == "training"
        case "attempt":  # only now is it starting: who was killed before this entry starts nothing
            record.state, record.reason = "starting", entry.reason
            record.attempt_nodes = tuple(fields["nodes"])
            record.began_at = fields["began_at"]
            record.is_counted = record.is_ending = record.has_stepped = False
        case "attempt failed":
            record.history.append(FailedAttempt.model_validate(fields))
            record.is_counted = True
        case "evidence":
            record.evidence.append(Evidence.model_validate(fields["evidence"]))
        case "isolation":
            _take_isolation(record, entry)
        case "stop":
            record.stop = _read_stop(fields)
        case "term":
            record.term = fields["term"]
        case "node":
            record.pids[fields["node"]] = fields["pid"]


def _take_isolation(record: Record, entry: Entry) -> None:
    """A node is set aside, or may be used again; its ranks have less to do, or their whole share again."""
    node, action = str(entry.fields["node"]), entry.fields["action"]
    if action == "degrade" and entry.fields["carried_out"]:
        slowdown = float(str(entry.fields["slowdown"]))
        record.slowed.setdefault(node, Slowed(slowdown, entry.time_s))
    elif action != "cordon":
        record.slowed.pop(node, None)
    if action == "return":
        record.drained.pop(node, None)
    elif action in ("drain", "replace") and entry.fields["carried_out"]:
        by = entry.fields["by"]
        record.drained[node] = Drained(entry.reason, entry.time_s, None if by is None else str(by))
        if by is None:
            record.isolated_s.append(entry.time_s)


def _read_stop(fields: Mapping[str, Any]) -> Stop:
    """The request that the journal tells; the time to save starts again with this controller."""
    grace_s = fields["grace_s"]
    deadline_s = None if grace_s is None else time.monotonic() + grace_s
    return Stop(signal.Signals(fields["signal"]), fields["at_once"], deadline_s)
