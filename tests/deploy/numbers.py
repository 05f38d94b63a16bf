"""Every number that jobs, agents and machines tell, by name: what dashboards and alerts may speak of."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from evermesh.fault.events import EventLog, Finding
from evermesh.launcher import Run
from evermesh.launcher.agent.numbers import NodeNumbers
from evermesh.launcher.agent.spec import AgentSpec
from evermesh.launcher.controller.status import JobStatus, NodeStatus, RankStatus, SnapshotStatus
from evermesh.launcher.messages import RankBeat
from evermesh.launcher.metrics.job import job_families
from evermesh.launcher.metrics.serving import rendered
from evermesh.launcher.metrics.totals import Totals
from evermesh.parallelism.ledger import Traffic
from tests.launcher.reports import step_report

_OF_TARGETS = {"run", "role", "job", "instance", "node", "host"}
_STATUS = JobStatus(
    name="job",
    directory="/runs/job",
    state="training",
    reason="all ranks train",
    generation=1,
    restarts=0,
    max_restarts=3,
    workers=1,
    nodes=(
        NodeStatus(
            node="node-0", host="a", state="ready", lease_left_s=1.0, memory_free_bytes=1, shared_memory_bytes=1
        ),
    ),
    ranks=(RankStatus(rank=0, node="node-0", state="training", step=5, step_s=0.5, compute_s=0.4),),
    steps=100,
    time_left_s=50.0,
    snapshot=SnapshotStatus(is_on=True, step=4, age_s=1.0, every=1),
    findings=(Finding(kind="hang", node="node-0", rank=0, confidence=0.9),),
    started_s=1.0,
    pid=1,
)


def every_number(folder: Path) -> dict[str, set[str]]:
    """Names of samples, each with its labels, those of targets included; of a job of which everything is known."""
    found: dict[str, set[str]] = {"up": set(_OF_TARGETS)}
    for text in (rendered(_Job(folder)).decode(), _of_agent(folder)):
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set(_OF_TARGETS)).update(sample.labels)
    return found


class _Job:
    def __init__(self, folder: Path) -> None:
        run = Run(folder)
        self._report = step_report(
            5, 0.5, held_out_loss=2.0, traffic=(Traffic("gradients", "all_reduce", "hdp", "node", 100, 200, 2),)
        )
        run.telemetry.write_text(self._report.to_json() + "\n")
        log = EventLog(run.events)
        log.write("started", "")
        log.close()
        self._totals = Totals(run)
        self._totals.read_on()

    def collect(self) -> Iterator[Metric]:
        return job_families(_STATUS, self._report, self._totals)


def _of_agent(folder: Path) -> str:
    """What a real agent's server answers."""
    spec = AgentSpec(run=folder, node="node-0", address="127.0.0.1", slots=1, warm_module="none")
    numbers = NodeNumbers(spec, "token", lambda: None)
    try:
        numbers.tell((RankBeat(rank=0, pid=1, step=5, step_s=0.5, compute_s=0.4),), 7)
        answer = httpx2.get(f"http://{numbers.at}/metrics", headers={"Authorization": "Bearer token"})
        answer.raise_for_status()
        return answer.text
    finally:
        numbers.close()
