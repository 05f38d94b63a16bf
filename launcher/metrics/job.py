"""A job in numbers, as Prometheus asks the controller for them."""

from collections.abc import Iterator, Sequence
from typing import get_args

from prometheus_client.core import InfoMetricFamily
from prometheus_client.metrics_core import Metric

from evermesh import __version__
from evermesh.fault.events import Finding
from evermesh.launcher.controller.status import JobState, JobStatus, NodeStatus, SnapshotStatus, Standing
from evermesh.launcher.metrics.families import counter, counters, gauge, gauges, states
from evermesh.launcher.metrics.totals import Totals
from evermesh.runtime.telemetry import StepReport

_NODE_STATES: tuple[str, ...] = get_args(NodeStatus.model_fields["state"].annotation)


def job_families(status: JobStatus, report: StepReport | None, totals: Totals) -> Iterator[Metric]:
    """All that is known of a job.

    Args:
        status: what its controller tells.
        report: the newest step; None before the first one of this controller.
        totals: what its files add up to.
    """
    yield InfoMetricFamily("evermesh_job", "The job.", value={"name": status.name, "version": __version__})
    yield from states("job_state", "1 for the state that the job is in.", get_args(JobState), status.state)
    yield from counter("attempts", "Lives of all workers so far.", status.generation)
    yield from counter("restarts", "Restarts so far.", status.restarts)
    yield from gauge("restarts_allowed", "Restarts that the job file allows.", status.max_restarts)
    yield from gauge("workers", "Workers of the current attempt.", status.workers)
    yield from gauge("started_timestamp_seconds", "When the job was launched, Unix time.", status.started_s)
    yield from gauge("steps_wanted", "Steps of the whole run.", status.steps)
    yield from gauge("time_left_seconds", "Estimated time to the end of the run.", status.time_left_s)
    yield from _nodes(status.nodes)
    yield from _ranks(status)
    if report is not None:
        yield from _step(report)
    if status.snapshot is not None:
        yield from _snapshot(status.snapshot)
    yield from _findings(status.findings)
    yield from _totals(totals)


def _step(report: StepReport) -> Iterator[Metric]:
    yield from gauge("step", "Steps finished.", report.step)
    yield from gauge("loss", "Mean loss per counted token of the newest step, nats.", report.loss)
    yield from gauge("held_out_loss", "The same of held-out documents.", report.held_out_loss)
    yield from gauge("gradient_norm", "Norm of the gradient of the newest step.", report.grad_norm)
    yield from gauge("learning_rate", "Learning rate of the newest step.", report.lr)
    yield from gauge("step_seconds", "Wall time of the newest step.", report.step_s)
    yield from gauge("tokens_per_second", "Tokens of the newest step over its wall time.", report.tokens_per_s)
    yield from gauge("plan_fill_ratio", "Tokens over capacity of the micro-batches in use.", report.plan.fill)
    yield from gauge(
        "plan_makespan_ratio", "Planned time of the newest step over its proven lower bound.", report.plan.ratio
    )
    yield from gauge("sequences_set_aside", "Sequences that made steps bad too often.", report.num_set_aside)


def _nodes(nodes: Sequence[NodeStatus]) -> Iterator[Metric]:
    labels = ("node", "host")
    yield from gauges(
        "node_state",
        "1 for the state that a node is in.",
        ("node", "host", "state"),
        (((node.node, node.host, state), float(state == node.state)) for node in nodes for state in _NODE_STATES),
    )
    for name, text, field in (
        ("node_is_spare", "1 for a node that waits to take the place of a lost one.", "is_spare"),
        ("node_lease_left_seconds", "Time until the node counts as lost, unless it is heard.", "lease_left_s"),
        ("node_memory_free_bytes", "Memory that is available.", "memory_free_bytes"),
        ("node_shared_memory_bytes", "Size of its shared-memory area.", "shared_memory_bytes"),
        ("node_snapshot_bytes", "Memory that its keeper holds snapshots and parity in.", "snapshot_bytes"),
    ):
        yield from gauges(name, text, labels, (((node.node, node.host), getattr(node, field)) for node in nodes))


def _ranks(status: JobStatus) -> Iterator[Metric]:
    for name, text, field in (
        ("rank_step", "Steps that the rank has finished.", "step"),
        ("rank_step_seconds", "Wall time of its newest step.", "step_s"),
        ("rank_compute_seconds", "The part of it before it met the others to sum gradients.", "compute_s"),
    ):
        found = (((str(rank.rank), rank.node), getattr(rank, field)) for rank in status.ranks)
        yield from gauges(name, text, ("rank", "node"), found)


def _snapshot(snapshot: SnapshotStatus) -> Iterator[Metric]:
    yield from gauge("snapshot_step", "Step of the newest snapshot in memory.", snapshot.step)
    yield from gauge("snapshot_age_seconds", "Age of the newest snapshot in memory.", snapshot.age_s)
    yield from gauge("snapshot_interval_steps", "Steps between two snapshots.", snapshot.every)
    yield from gauge("snapshots_committed", "Snapshots complete on all ranks, in this attempt.", snapshot.committed)
    yield from gauge("snapshots_skipped", "Snapshots not begun in this attempt.", snapshot.skipped)
    yield from gauge("snapshots_lost", "Snapshots given up in this attempt.", snapshot.lost)
    yield from states(
        "snapshot_protection",
        "1 for how other nodes protect the newest snapshot.",
        get_args(Standing),
        snapshot.protection,
    )
    yield from gauge("restart_lost_steps", "Steps that a restart of all workers would cost.", snapshot.lost_steps)
    yield from gauge("node_loss_lost_steps", "Steps that the loss of a node would cost.", snapshot.lost_steps_of_node)


def _findings(findings: Sequence[Finding]) -> Iterator[Metric]:
    yield from gauge("findings", "Findings of the detectors that hold now.", len(findings))
    surest: dict[tuple[str, str, str], float] = {}
    for found in findings:
        labels = (found.kind, found.node or "", "" if found.rank is None else str(found.rank))
        surest[labels] = max(found.confidence, surest.get(labels, 0.0))
    yield from gauges(
        "finding_confidence", "Probability that a finding is true.", ("kind", "node", "rank"), surest.items()
    )


def _totals(totals: Totals) -> Iterator[Metric]:
    yield from counter("trained_steps", "Steps that were trained, those trained again included.", totals.steps)
    yield from counter("skipped_steps", "Steps whose update the guard skipped.", totals.skipped_steps)
    yield from counter("trained_tokens", "Tokens of all steps that were trained.", totals.tokens)
    yield from counters(
        "step_part_seconds",
        "Wall time of all steps by what rank 0 spent it on.",
        "part",
        sorted(totals.seconds.items()),
    )
    yield from counters(
        "sent_bytes", "Bytes that all ranks sent, by tier of the link.", "tier", sorted(totals.bytes.items())
    )
    yield from counters("events", "Lines of the event log by kind.", "kind", sorted(totals.events.items()))
