"""The report of a run as data."""

import time
from collections import Counter
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from evermesh.fault.events import Event, read_events
from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.journal import Entry, read_journal
from evermesh.launcher.report.accounting import AGAIN, COUNTED, Span, Step, parts_of, spans_of, steps_of
from evermesh.launcher.report.incidents import Incident, incidents_of
from evermesh.launcher.report.isolated import isolated_nodes
from evermesh.launcher.run_directory import Run
from evermesh.runtime.telemetry import StepReport

MFU_CONVENTION = (
    "Model FLOPs are three times those of the forward pass: matrix products of every token, logits included, and of "
    "attention the pairs that a causal mask leaves; nothing that is computed twice and no padding. Utilisation is these per "
    "second and worker over the peak of a device."
)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Cost(_Frozen):
    """What the run took."""

    worker_hours: float
    """Workers of the job times wall time of its launches."""
    useful_worker_hours: float
    """In steps that count."""
    lost_worker_hours: float
    """In steps that were trained again."""
    price: float | None = None
    """Of all worker hours, where a price of one is given."""


class Training(_Frozen):
    """What was trained."""

    steps: int
    steps_wanted: int | None
    skipped: int
    """Steps whose update the guard left out: not finite, or a spike."""
    trained_again: int
    tokens: int
    first_loss: float | None
    loss: float | None
    tokens_per_s: float
    """Over steps that count."""
    flops_per_s_and_worker: float
    """Model FLOPs over steps that count."""
    utilisation: float | None = None
    """Of the peak, where one is given."""
    largest_grad_norm: float


class JobReport(_Frozen):
    """A run as a whole."""

    name: str
    directory: str
    state: str
    reason: str
    began_s: float
    wall_s: float
    """Of all launches together."""
    attempts: int
    workers: int
    nodes: int
    goodput: float
    """Share of the wall time in steps that count."""
    parts: dict[str, float]
    """Seconds by what they were spent on; together ``wall_s``."""
    training: Training
    cost: Cost
    incidents: tuple[Incident, ...]
    events: dict[str, int]
    """Lines of the event log by kind."""
    notable: tuple[Event, ...]
    """Findings, decisions about nodes, and what became of snapshots and storage."""


class Material(BaseModel):
    """What pictures are made of, besides the report."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    spans: tuple[Span, ...]
    steps: tuple[Step, ...]
    events: tuple[Event, ...]


NOTABLE = (
    "finding",
    "finding over",
    "health",
    "isolation",
    "speeds",
    "skipped",
    "set aside",
    "node cut off",
    "node back",
    "node lost",
    "keeper lost",
    "snapshot damaged",
    "snapshot lost",
    "snapshot rebuilt",
    "layout chosen",
    "layout moved",
    "regrouping",
    "checkpoint failed",
    "node refused",
)
_MOST_NOTABLE = 500


def gather(run: Run, *, price: float | None = None, peak_flops: float | None = None) -> tuple[JobReport, Material]:
    """The report of a run, living or dead.

    Args:
        price: of a worker for an hour, in any currency.
        peak_flops: of one worker's device, FLOP/s.
    """
    entries = list(read_journal(run.journal))
    events = list(read_events(run.events)) if run.events.is_file() else []
    steps = steps_of(_all_reports(run))
    spans = spans_of(entries, time.time())
    wall_s = sum(span.seconds for span in spans)
    parts, config = parts_of(spans, steps), run.config()
    last = next((entry for entry in reversed(entries) if entry.kind == "transition"), None)
    report = JobReport(
        name=run.name,
        directory=str(run.directory.absolute()),
        state=str(last.fields["to"]) if last is not None else "placing",
        reason=last.reason if last is not None else "",
        began_s=spans[0].begin_s if spans else 0.0,
        wall_s=wall_s,
        attempts=sum(entry.kind == "attempt" for entry in entries),
        workers=config.workers,
        nodes=config.nodes,
        goodput=parts.get(COUNTED, 0.0) / wall_s if wall_s else 0.0,
        parts=parts,
        training=_training(steps, config, peak_flops),
        cost=_cost(parts, wall_s, config, price),
        incidents=_incidents(entries, events, steps),
        events=dict(Counter(event.kind for event in events).most_common()),
        notable=tuple(event for event in events if event.kind in NOTABLE)[:_MOST_NOTABLE],
    )
    return report, Material(spans=tuple(spans), steps=tuple(steps), events=tuple(events))


def _incidents(entries: Sequence[Entry], events: Sequence[Event], steps: Sequence[Step]) -> tuple[Incident, ...]:
    found = (*incidents_of(entries, events, steps), *isolated_nodes(entries, events, steps))
    return tuple(sorted(found, key=lambda incident: incident.time_s))


def _all_reports(run: Run) -> list[StepReport]:
    """Every step that was trained, those trained again included."""
    if not run.telemetry.is_file():
        return []
    with run.telemetry.open("rb") as lines:
        return [StepReport.from_json(line) for line in lines if line.endswith(b"\n")]


def _training(steps: list[Step], config: JobConfig, peak_flops: float | None) -> Training:
    counted = [step.report for step in steps if not step.is_lost]
    seconds = sum(report.step_s for report in counted)
    worker_s = sum(report.step_s * report.workers for report in counted)
    rate = sum(report.model_flops for report in counted) / worker_s if worker_s else 0.0
    tokens = sum(report.num_tokens for report in counted)
    return Training(
        steps=counted[-1].step if counted else 0,
        steps_wanted=config.train.steps,
        skipped=sum(not report.committed for report in counted),
        trained_again=sum(step.is_lost for step in steps),
        tokens=tokens,
        first_loss=counted[0].loss if counted else None,
        loss=counted[-1].loss if counted else None,
        tokens_per_s=tokens / seconds if seconds else 0.0,
        flops_per_s_and_worker=rate,
        utilisation=rate / peak_flops if peak_flops else None,
        largest_grad_norm=max((report.grad_norm for report in counted), default=0.0),
    )


def _cost(parts: dict[str, float], wall_s: float, config: JobConfig, price: float | None) -> Cost:
    hours = config.workers / 3600
    return Cost(
        worker_hours=wall_s * hours,
        useful_worker_hours=parts.get(COUNTED, 0.0) * hours,
        lost_worker_hours=parts.get(AGAIN, 0.0) * hours,
        price=None if price is None else price * wall_s * hours,
    )
