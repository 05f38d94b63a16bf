"""What people see of a job at a glance: what is found where, and which nodes it does without."""

from evermesh.fault.events import Finding
from evermesh.launcher.controller.status import JobStatus, NodeStatus
from evermesh.launcher.status_tables import aside_lines, findings_lines, nodes_table

_NODES = (
    NodeStatus(node="node-0", state="ready", ranks=(0, 1)),
    NodeStatus(node="node-1", state="ready", ranks=(2, 3), known_as="gpu17/0"),
    NodeStatus(node="node-2", state="ready", is_spare=True, aside="node-2 is drained by me: fan 3"),
)
_FINDINGS = (
    Finding(kind="slow rank", rank=1, text="rank 1 computes longer", confidence=0.9),
    Finding(kind="slow rank", rank=0, text="rank 0 computes longer", confidence=0.9),
    Finding(kind="slow link", link=(1, 2), text="what ranks 1 and 2 send each other", confidence=0.85),
    Finding(kind="slow node", node="gpu17/0", text="what passes its network", confidence=0.8),
    Finding(kind="slow job", text="the job takes [1.5] times as long", confidence=0.8),
)


def _status(**changes: object) -> JobStatus:
    status = JobStatus(
        name="x", directory="x", state="training", reason="", generation=1, restarts=0, max_restarts=3, workers=2,
        nodes=_NODES, findings=_FINDINGS, started_s=0.0, pid=1,
    )  # fmt: skip
    return status.model_copy(update=changes)


def test_findings_are_told_and_shown_at_the_nodes_that_they_name() -> None:
    status = _status()
    assert [line.plain for line in findings_lines(status)][
        -1
    ] == "slow job  the job takes [1.5] times as long (80% sure)"
    states = list(nodes_table(status.nodes, status.findings).columns[1].cells)
    assert states == [
        "[green]ready[/] [red]slow rank[/] [red]slow link[/]",
        "[green]ready[/] [red]slow link[/] [red]slow node[/]",
        "[green]ready[/] [yellow]aside[/]",
    ]


def test_nodes_that_are_set_aside_are_told_with_the_reason_and_a_rack_that_holds_too_much() -> None:
    assert [line.plain for line in aside_lines(_status())] == ["aside: node-2 is drained by me: fan 3"]
    assert next(line.plain for line in aside_lines(_status(lost_rack="rack r1: two nodes"))) == "rack r1: two nodes"
