"""What a restart would lose: from memory, from storage, from nothing; as people are told."""

from dataclasses import replace
from typing import Any

import pytest

from evermesh.launcher.controller.remembering import snapshot_status
from evermesh.launcher.controller.status import JobStatus, NodeStatus
from evermesh.launcher.status_tables import snapshot_line
from evermesh.runtime.telemetry import PlanSummary, SnapshotReport, StepReport

PLAN = PlanSummary(ring_sizes={1: 4}, micro_batches=(1, 1), fill=0.5, makespan_s=0.1, lower_bound_s=0.1)
REPORT = StepReport(
    step=120, steps=200, loss=1.0, grad_norm=1.0, lr=0.1, committed=True, num_tokens=10, num_sequences=1, num_split=0,
    workers=2, step_s=0.5, time_left_s=40.0, plan=PLAN, bytes_by_site={}, batch="",
    snapshot=SnapshotReport(step=117, age_s=1.5, every=4, committed=30, skipped=2, lost=1, stop_s=0.01),
)  # fmt: skip


def status(report: StepReport | None, saved: int | None = 100, **changes: Any) -> JobStatus:
    found = None if report is None else snapshot_status(report, 0.25, saved, is_on=True)
    return JobStatus(
        name="x", directory="x", state="training", reason="", generation=1, restarts=0, max_restarts=3, workers=2,
        nodes=(NodeStatus(node="node-0", state="ready", snapshot_bytes=3 << 20),), snapshot=found, started_s=0.0, pid=1,
    ).model_copy(update=changes)  # fmt: skip


def test_a_report_with_snapshots_is_read_back() -> None:
    assert StepReport.from_json(REPORT.to_json()) == REPORT
    assert StepReport.from_json(
        REPORT.to_json().replace(',"snapshot":', ',"x":').partition(',"x":')[0] + "}"
    ) == replace(REPORT, snapshot=SnapshotReport()), "a run that began before is still read"


def test_a_restart_from_memory_loses_the_steps_since_the_snapshot_and_a_lost_node_those_since_the_checkpoint() -> None:
    found = snapshot_status(REPORT, 0.25, 100, is_on=True)
    assert (found.step, found.age_steps, found.age_s, found.every) == (117, 3, 1.75, 4)
    assert (found.source, found.lost_steps, found.lost_s, found.lost_steps_of_node) == ("memory", 3, 1.5, 20)
    assert (found.committed, found.skipped, found.lost) == (30, 2, 1)


def test_a_lost_node_costs_what_a_lost_worker_costs_where_other_nodes_protect_its_snapshots() -> None:
    found = snapshot_status(REPORT, 0.25, 100, is_on=True, protection="protected")
    assert (found.protection, found.lost_steps, found.lost_steps_of_node) == ("protected", 3, 3)
    assert snapshot_status(REPORT, 0.25, 100, is_on=True, protection="degraded").lost_steps_of_node == 20


@pytest.mark.parametrize(
    ("snapshot", "saved", "expected"),
    [(117, 119, ("storage", 1, 1)), (None, 100, ("storage", 20, 20)), (None, None, ("nothing", 120, 120)),
     (117, 117, ("memory", 3, 3)), (117, None, ("memory", 3, 120))],
)  # fmt: skip
def test_where_a_restart_would_begin(snapshot: int | None, saved: int | None, expected: tuple[str, int, int]) -> None:
    report = replace(REPORT, snapshot=SnapshotReport(step=snapshot))
    found = snapshot_status(report, 0.0, saved, is_on=True)
    assert (found.source, found.lost_steps, found.lost_steps_of_node) == expected


def test_people_see_at_a_glance_what_a_restart_would_lose() -> None:
    assert snapshot_line(status(REPORT)).plain == (
        "snapshot of step 117 in memory, 3 steps (1.8 s) old, one every 4 steps, 3.0 MiB per node | 30 complete, 2 skipped, "
        "1 lost | a restart loses 3 steps (1.5 s), from memory; a lost node 20 steps"
    )
    none = replace(REPORT, snapshot=SnapshotReport())
    assert snapshot_line(status(none)).plain == (
        "no snapshot in memory | a restart loses 20 steps (10.0 s), from storage; a lost node 20 steps"
    )
    assert "a restart would lose nothing" in snapshot_line(status(None)).plain
    off = snapshot_status(none, 0.0, None, is_on=False)
    assert snapshot_line(status(none, snapshot=off)).plain.startswith("snapshots are off | a restart loses 120 steps")


def test_what_other_nodes_protect_is_not_told_as_lost_with_a_node() -> None:
    found = snapshot_status(REPORT, 0.25, 100, is_on=True)
    protected = snapshot_line(status(REPORT, snapshot=found.model_copy(update={"protection": "protected"}))).plain
    assert ", protected | " in protected
    assert "a lost node" not in protected
    degraded = snapshot_line(status(REPORT, snapshot=found.model_copy(update={"protection": "degraded"}))).plain
    assert ", degraded | " in degraded
    assert "a lost node" in degraded
