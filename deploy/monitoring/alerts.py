"""Alerts for Prometheus: when somebody should look at a job, and at what of it."""

from dataclasses import dataclass
from typing import Any, Literal

_BUSY = 'evermesh_job_state{state=~"starting|training|regrouping|recovering"} == 1'
"""A job that should make steps."""


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert; ``text`` may name labels as {{ $labels.run }} and the value as {{ $value }}."""

    name: str
    expr: str
    """True where it returns anything."""
    for_s: int
    """How long it must hold, seconds."""
    severity: Literal["critical", "warning"]
    text: str
    way_out: str


ALERTS = (
    Alert(
        "EvermeshControllerSilent",
        'up{job="evermesh", role="controller"} == 0',
        60,
        "critical",
        "The controller of {{ $labels.run }} does not answer at {{ $labels.instance }}.",
        "`evermesh status` says whether the job lives, its log why it failed; `evermesh resume` goes on.",
    ),
    Alert(
        "EvermeshNoSteps",
        f"increase(evermesh_trained_steps_total[15m]) == 0 and on (run) ({_BUSY}) "
        "and on (run) (time() - evermesh_started_timestamp_seconds > 900)",
        60,
        "critical",
        "{{ $labels.run }} has made no step for 15 minutes.",
        "`evermesh status` names the rank, `evermesh logs --stacks` what every rank is doing.",
    ),
    Alert(
        "EvermeshWaitsForNodes",
        'evermesh_job_state{state="waiting"} == 1',
        120,
        "critical",
        "{{ $labels.run }} waits for nodes.",
        "`evermesh nodes` says which are missing and why; it ends with 75 when none comes.",
    ),
    Alert(
        "EvermeshRestartsUsedUp",
        "evermesh_restarts_total >= evermesh_restarts_allowed and evermesh_restarts_allowed > 0",
        0,
        "critical",
        "{{ $labels.run }} has restarted {{ $value }} times, as often as it may: the next failure ends it.",
        "`evermesh report` tells what failed; `restarts` in the job file allows more.",
    ),
    Alert(
        "EvermeshLossNotFinite",
        "evermesh_loss != evermesh_loss or abs(evermesh_loss) == Inf",
        0,
        "critical",
        "The loss of {{ $labels.run }} is not a number.",
        "The step guard skips such steps; see skipped steps in events.jsonl, and the learning rate.",
    ),
    Alert(
        "EvermeshSkipsSteps",
        "increase(evermesh_skipped_steps_total[30m]) / increase(evermesh_trained_steps_total[30m]) > 0.1",
        300,
        "warning",
        "{{ $labels.run }} skips {{ $value | humanizePercentage }} of its steps.",
        "events.jsonl says why each was skipped; lower the learning rate, or look at the samples it names.",
    ),
    Alert(
        "EvermeshFinding",
        "evermesh_finding_confidence >= 0.5",
        30,
        "warning",
        "{{ $labels.run }}: {{ $labels.kind }}, node {{ $labels.node }}, rank {{ $labels.rank }}.",
        "`evermesh status` has the sentence and the numbers; `evermesh drain NODE` goes on without a node.",
    ),
    Alert(
        "EvermeshNodeNotReady",
        'evermesh_node_state{state=~"cut off|lost|refused"} == 1',
        60,
        "warning",
        "Node {{ $labels.node }} ({{ $labels.host }}) of {{ $labels.run }} is {{ $labels.state }}.",
        "`evermesh nodes` says why; a spare takes its place where there is one.",
    ),
    Alert(
        "EvermeshAgentSilent",
        'up{job="evermesh", role="agent"} == 0',
        60,
        "warning",
        "The agent of {{ $labels.node }} ({{ $labels.host }}), {{ $labels.run }}, is silent at {{ $labels.instance }}.",
        "`evermesh nodes`; where the controller still hears it, a firewall is between it and Prometheus.",
    ),
    Alert(
        "EvermeshAgentWithoutController",
        "evermesh_agent_without_controller_seconds > 60",
        0,
        "critical",
        "{{ $labels.node }} of {{ $labels.run }} has had no controller for {{ $value | humanizeDuration }}.",
        "Ranks train on meanwhile. `evermesh resume` starts a controller where none comes by itself.",
    ),
    Alert(
        "EvermeshRankStopped",
        "evermesh_agent_rank_stopped_seconds > 30",
        0,
        "warning",
        "Rank {{ $labels.rank }} on {{ $labels.node }} of {{ $labels.run }} is stopped (SIGSTOP, or a debugger).",
        "Let it go on (SIGCONT), or have the job end it: `hang` in the job file.",
    ),
    Alert(
        "EvermeshSnapshotOld",
        f"evermesh_step - evermesh_snapshot_step > 3 * evermesh_snapshot_interval_steps and on (run) ({_BUSY})",
        300,
        "warning",
        "A restart of {{ $labels.run }} would lose {{ $value }} steps: snapshots are not completed.",
        "The event `snapshot` in events.jsonl says what is missing, usually memory on a node.",
    ),
    Alert(
        "EvermeshSnapshotDegraded",
        'evermesh_snapshot_protection{state="degraded"} == 1',
        600,
        "warning",
        "Fewer nodes protect the snapshots of {{ $labels.run }} than should.",
        "`evermesh nodes` tells which are missing; spares make stripes whole again.",
    ),
    Alert(
        "EvermeshGoodputLow",
        'sum by (run) (rate(evermesh_step_part_seconds_total{part="training"}[30m])) < 0.8 '
        f"and on (run) ({_BUSY}) and on (run) (time() - evermesh_started_timestamp_seconds > 3600)",
        600,
        "warning",
        "{{ $labels.run }} spent {{ $value | humanizePercentage }} of the last 30 minutes training.",
        "`evermesh report` tells what the rest went to: restarts, checkpoints, or waits for plans.",
    ),
    Alert(
        "EvermeshMemoryLow",
        "evermesh_machine_memory_available_bytes / evermesh_machine_memory_bytes < 0.05",
        300,
        "warning",
        "{{ $labels.node }} ({{ $labels.host }}) has {{ $value | humanizePercentage }} of its memory left.",
        "Snapshots take twice what ranks hold: `train.snapshot`; or fewer `threads`, smaller `capacity`.",
    ),
    Alert(
        "EvermeshOutOfMemoryKill",
        "increase(evermesh_machine_oom_kills_total[15m]) > 0",
        0,
        "critical",
        "The kernel ended a process of {{ $labels.node }} ({{ $labels.host }}) for want of memory.",
        "`dmesg` names it.",
    ),
    Alert(
        "EvermeshDiskFull",
        "evermesh_machine_file_system_free_bytes / evermesh_machine_file_system_bytes < 0.05",
        300,
        "warning",
        "{{ $labels.folder }} on {{ $labels.node }} ({{ $labels.host }}) has {{ $value | humanizePercentage }} left.",
        "`evermesh checkpoint prune`; a job goes on without storage from memory, but cannot save.",
    ),
)
"""The first ones are about jobs, then nodes, snapshots, machines."""


def rules() -> dict[str, Any]:
    """The rule file."""
    return {"groups": [{"name": "evermesh", "rules": [_rule(alert) for alert in ALERTS]}]}


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": f"{alert.for_s}s",
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.text, "description": alert.way_out},
    }
