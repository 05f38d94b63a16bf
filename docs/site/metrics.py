"""The list of all numbers for Prometheus: what a job and a node of which everything is known tell."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from prometheus_client.metrics_core import Metric

from evermesh.fault.events import Finding
from evermesh.launcher.agent.numbers import NodeNumbers
from evermesh.launcher.agent.spec import AgentSpec
from evermesh.launcher.controller.status import JobStatus, NodeStatus, RankStatus, SnapshotStatus
from evermesh.launcher.messages import RankBeat
from evermesh.launcher.metrics.job import job_families
from evermesh.launcher.metrics.node import NodeCollector
from evermesh.launcher.metrics.totals import Totals
from evermesh.runtime.telemetry import PlanSummary, StepReport

_HEAD = """# Metrics

All numbers that Prometheus is told, made from the code that tells them. A number that is not known is left out.
[Numbers for Prometheus](../monitor/prometheus.md) says where they are served,
[what to alert on](../operate/alerts.md) which of them matter.
"""
_OF_THE_JOB = "\n## Of a job\n\nUnder `/api/metrics` of its controller.\n\n"
_OF_A_NODE = (
    "\n## Of a node\n\nUnder `/metrics` of its agent. Those named `evermesh_machine_...` also of machines without a job "
    "(`evermesh metrics --serve`).\n\n"
)
_SUFFIXES = {"counter": "_total", "info": "_info"}


def metrics_page() -> str:
    """The page, in Markdown."""
    return f"{_HEAD}{_OF_THE_JOB}{_table(of_a_job())}\n{_OF_A_NODE}{_table(of_a_node())}\n"


def metric_name(family: Metric) -> str:
    """As Prometheus sees it."""
    return family.name + _SUFFIXES.get(family.type, "")


def of_a_job() -> Iterator[Metric]:
    """Every family of a job."""
    status = JobStatus(
        name="job",
        directory="runs/job",
        state="training",
        reason="all ranks train",
        generation=1,
        restarts=0,
        max_restarts=3,
        workers=1,
        nodes=(
            NodeStatus(node="n", host="h", state="ready", lease_left_s=1, memory_free_bytes=1, shared_memory_bytes=1),
        ),
        ranks=(RankStatus(rank=0, node="n", state="training", step=1, step_s=1, compute_s=1),),
        step=1,
        steps=2,
        time_left_s=1,
        snapshot=SnapshotStatus(is_on=True, step=1, age_s=1, every=1),
        findings=(Finding(kind="slow rank", rank=0, node="n", confidence=0.9),),
        started_s=1,
        pid=1,
    )
    totals = SimpleNamespace(steps=1, skipped_steps=0, tokens=1)
    totals.seconds, totals.bytes, totals.events = (Counter({"x": 1}) for _ in range(3))
    return job_families(status, _step(), cast(Totals, totals))


def of_a_node() -> Iterator[Metric]:
    """Every family of a node, of this machine for want of another."""
    spec = AgentSpec(run=Path("runs/job"), node="n", address="", slots=1, warm_module="", metrics=False)
    numbers = NodeNumbers(spec, "", lambda: None)
    numbers.tell((RankBeat(rank=0, pid=1, step=1, step_s=1, compute_s=1),), 1)
    return NodeCollector((), numbers.families).collect()


def _step() -> StepReport:
    return StepReport(
        step=1,
        steps=2,
        loss=1,
        grad_norm=1,
        lr=1,
        committed=True,
        num_tokens=1,
        num_sequences=1,
        num_split=0,
        workers=1,
        step_s=1,
        time_left_s=1,
        plan=PlanSummary({1: 1}, (1,), 1, 1, 1),
        bytes_by_site={},
        batch="",
        held_out_loss=1,
    )


def _table(families: Iterator[Metric]) -> str:
    return "\n".join(["| name | type | labels | meaning |", "|---|---|---|---|", *map(_row, families)])


def _row(family: Metric) -> str:
    labels = dict.fromkeys(label for sample in family.samples for label in sample.labels)
    told = ", ".join(f"`{label}`" for label in labels)
    return f"| `{metric_name(family)}` | {family.type} | {told} | {family.documentation} |"
