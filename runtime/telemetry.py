"""What a step reports: one JSON object per line in ``telemetry.jsonl``, also sent to the launcher; imports no torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.ledger import Traffic


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """A batch plan in short."""

    ring_sizes: dict[int, int]
    """Number of sequences per ring size."""
    micro_batches: tuple[int, ...]
    """Number of micro-batches of every HDP rank."""
    fill: float
    """Tokens over capacity of the micro-batches in use, 0 to 1."""
    makespan_s: float
    lower_bound_s: float

    @classmethod
    def of(cls, plan: BatchPlan) -> Self:
        """The summary of ``plan``."""
        return cls(
            ring_sizes=plan.ring_sizes(),
            micro_batches=tuple(len(micro_batches) for micro_batches in plan.ranks),
            fill=plan.fill,
            makespan_s=plan.certificate.makespan_s,
            lower_bound_s=plan.certificate.lower_bound_s,
        )

    @property
    def ratio(self) -> float:
        """Makespan over its lower bound."""
        return self.makespan_s / self.lower_bound_s if self.lower_bound_s > 0 else 1.0

    def __str__(self) -> str:
        rings = " ".join(f"{count}x{size}" for size, count in self.ring_sizes.items())
        return f"rings {rings} | fill {self.fill:.0%} | makespan/bound {self.ratio:.3f}"


@dataclass(frozen=True, slots=True)
class SnapshotReport:
    """How it stands with snapshots in the memory of the nodes, in this attempt."""

    step: int | None = None
    """Of the newest that all ranks hold; None: there is none."""
    age_s: float = 0.0
    """Seconds since that was copied, or restored."""
    every: int | None = None
    """Steps between two, as chosen or configured; None: not known yet."""
    committed: int = 0
    """Complete on all ranks."""
    skipped: int = 0
    """Not begun, because the one before was not complete."""
    lost: int = 0
    """Begun, and given up because a rank lost its keeper."""
    stop_s: float = 0.0
    """Of ``step_s``: seconds that rank 0 stood still for the copy behind the step before."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step as rank 0 saw it."""

    step: int
    """Steps finished, from 1."""
    steps: int
    """Steps of the whole run."""
    loss: float
    """Mean loss per counted token of the global batch, nats."""
    grad_norm: float
    lr: float
    committed: bool
    """False when the guard skipped the update."""
    num_tokens: int
    """Tokens of the global batch."""
    num_sequences: int
    num_split: int
    """Sequences of this batch that are parts of a document longer than the context."""
    workers: int
    step_s: float
    """Wall time of the step, seconds."""
    time_left_s: float
    """Estimated time to the end of the run (or to ``stop_at``), seconds."""
    plan: PlanSummary
    bytes_by_site: dict[str, int]
    """Payload bytes that all ranks together handed to rings and collectives in this step, by what they were sent for."""
    batch: str
    """Digest of the identities and lengths of the batch's sequences."""
    traffic: tuple[Traffic, ...] = ()
    """Everything that all ranks together sent for this step, by call site, operation, mesh axis and tier of the link."""
    offloaded_bytes: int = 0
    """Activations that all ranks together moved to host memory; each comes back once."""
    padding_tokens: int = 0
    """Tokens that micro-batches were padded with, over all HDP ranks, so that compiled code can be used again."""
    compiled_graphs: int = 0
    """Graphs that rank 0 has compiled since the attempt began."""
    plan_wait_s: float = 0.0
    """Of ``step_s``: seconds that rank 0 waited for the batch and its plan, which are prepared during the step before."""
    held_out_loss: float | None = None
    """Mean loss per counted token of the held-out documents after this step, nats; None: it was not evaluated."""
    mean_steps_late: float = 0.0
    """Steps that a token of the batch was trained late on average; see ``train.data.outlier_delay``."""
    most_steps_late: int = 0
    """Steps that the token which waited longest was trained late."""
    num_waiting: int = 0
    """Sequences that are drawn, and left for later batches."""
    num_again: int = 0
    """Sequences of the batch that were in a step that was skipped, and were tried again."""
    num_to_try_again: int = 0
    """Sequences of skipped steps that wait, behind this step, to be tried again."""
    num_set_aside: int = 0
    """Sequences of skipped steps that were tried again too often, so far: they are not trained on."""
    checkpoint_stop_s: float = 0.0
    """Of ``step_s``: seconds that rank 0 stood still for the checkpoint of the step before."""
    checkpoint_write_s: float = 0.0
    """Seconds from the copy of the state to the commit, of the checkpoint that became visible during this step; 0: none."""
    relayout_s: float = 0.0
    """Seconds in which the run moved to another layout before this step; in no ``step_s``."""
    relayout_bytes: int = 0
    """Bytes of the state that went from one rank to another then."""
    snapshot: SnapshotReport = SnapshotReport()
    ended_s: float = 0.0
    """Wall clock at the end of the step, seconds since 1970; 0: not written down."""
    model_flops: float = 0.0
    """FLOPs that the step had to do (``ModelShape.model_flops``)."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens of the step over its wall time."""
        return self.num_tokens / self.step_s if self.step_s > 0 else 0.0

    def to_json(self) -> str:
        """The report as one line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        """The report that ``to_json`` wrote."""
        values: dict[str, Any] = json.loads(line)
        plan = values.pop("plan")
        plan["ring_sizes"] = {int(size): count for size, count in plan["ring_sizes"].items()}
        plan["micro_batches"] = tuple(plan["micro_batches"])
        traffic = tuple(Traffic(**part) for part in values.pop("traffic", ()))
        snapshot = SnapshotReport(**values.pop("snapshot", {}))
        return cls(**values, plan=PlanSummary(**plan), traffic=traffic, snapshot=snapshot)


def read_telemetry(path: Path) -> list[StepReport]:
    """All reports in ``path``, a step that was run again (after a resume) with its last values; an unfinished last line
    (the writer was killed) is left out."""
    reports: dict[int, StepReport] = {}
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            report = StepReport.from_json(line)
            reports[report.step] = report
    return [reports[step] for step in sorted(reports)]
