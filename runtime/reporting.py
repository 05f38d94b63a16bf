"""Measures every step of a run, and tells the user and the folder of the run about it."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import JsonValue

from evermesh.fault.events import EventLog
from evermesh.parallelism.layout.explain import fields_of
from evermesh.parallelism.layout.switching import Advice
from evermesh.parallelism.ledger import ByteLedger
from evermesh.runtime.advice import LayoutWatch, layout_watch
from evermesh.runtime.calibration import event_of
from evermesh.runtime.compiling import padding_of
from evermesh.runtime.data import Batch
from evermesh.runtime.feed import PlannedBatch
from evermesh.runtime.guard.retries import names_of
from evermesh.runtime.guard.step_guard import Verdict
from evermesh.runtime.telemetry import PlanSummary, StepReport
from evermesh.runtime.traffic import over_all_ranks, payload_bytes

if TYPE_CHECKING:
    from evermesh.runtime.trainer import Trainer

TRAFFIC = (
    "ring forward",
    "ring backward",
    "ring gradients",
    "gather forward",
    "gather backward",
    "gather gradients",
    "heads forward",
    "heads backward",
    "tensor forward",
    "tensor backward",
    "pipeline forward",
    "pipeline backward",
    "expert forward",
    "expert backward",
    "loss",
    "gradients",
    "sharded parameters",
    "parameters",
)
"""Call sites whose payload a step reports in ``bytes_by_site``."""
Asked = Literal["save", "stop", "regroup"] | Mapping[str, JsonValue]
"""What somebody may ask of a running trainer: a checkpoint now, a checkpoint and the end, the end with the state in memory
for other ranks, or to go on with these changes to the layout."""
Agreed = Literal["save", "stop", "regroup", "move"]
"""What all ranks do of that."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """One step as all ranks agree on it."""

    loss: float
    grad_norm: float
    verdict: Verdict
    asked: Agreed | None
    compute_s: float
    """Of this rank, before the ranks met to sum gradients."""

    @property
    def committed(self) -> bool:
        """Whether the update was made."""
        return self.verdict.commits


class Reporter:
    """Writes ``telemetry.jsonl`` and ``events.jsonl``, and calls who wants to know.

    Args:
        trainer: whose run it is; complete but for this.
        report: called on rank 0 after every step.
        beat: called on every rank after every step; see ``Trainer``.
    """

    def __init__(
        self,
        trainer: "Trainer",
        report: Callable[[StepReport], None] | None,
        beat: Callable[[int, float, float], None] | None,
    ) -> None:
        self._trainer, self._report, self._beat = trainer, report, beat
        self.ledger = ByteLedger()
        self._events = EventLog(trainer.directory / "events.jsonl") if trainer.directory and trainer.rank == 0 else None
        self._clock = _Clock()
        self._told_graphs = 0
        self._watch = _layout_watch(trainer)

    def begin(self) -> None:
        """The first step begins now."""
        self._clock = _Clock()

    def leave_out(self, seconds: float) -> None:
        """Count the last ``seconds`` to no step."""
        self._clock.leave_out(seconds)

    def take_layout(self) -> None:
        """Another layout has taken over."""
        self.ledger.take_step(self._trainer.progress.step + 1)  # of the batch that was planned for the one before
        if self._watch is not None:
            for _ in self._watch.close():
                pass  # it compares with the layout that was
        self._watch = _layout_watch(self._trainer)

    def end(self) -> None:
        """No step follows."""
        if self._watch is not None:
            self._log_advice(self._watch.close())

    def log(self, kind: str, text: str, *, step: int | None = None, **fields: Any) -> None:
        """Write an event of ``step``, by default the one under way, on rank 0."""
        if self._events is not None:
            self._events.write(kind, text, step=self._trainer.progress.step if step is None else step, **fields)

    def report_step(self, batch: PlannedBatch, outcome: StepOutcome, last: int, held_out_loss: float | None) -> None:
        """Behind every step; ``last`` is that of this attempt. Collective."""
        trainer = self._trainer
        own = self.ledger.take_step(trainer.progress.step)
        traffic = over_all_ranks(own, trainer.groups.world, trainer.device)
        offloaded_bytes = trainer.built.memory.take_bytes(trainer.groups.world)
        step_s, smoothed_s = self._clock.tick()
        if self._beat is not None:
            self._beat(trainer.progress.step, step_s, outcome.compute_s)
        if trainer.rank != 0:
            return
        padding_tokens = padding_of(batch.plan, trainer.config.layout.tp, trainer.config.buckets)
        self._log_compiled(padding_tokens / max(1, batch.plan.num_tokens))
        stop_s, write_s = trainer.saves.take_times()
        relayout_s, relayout_bytes = trainer.relayout.take()
        report = StepReport(
            step=trainer.progress.step,
            steps=trainer.config.steps,
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            lr=trainer.learning_rate() * outcome.verdict.lr_scale,
            committed=outcome.committed,
            num_tokens=batch.plan.num_tokens,
            num_sequences=len(batch.plan.lengths),
            num_split=sum(sequence.is_split for sequence in batch.batch.sequences),
            workers=trainer.workers,
            step_s=step_s,
            time_left_s=smoothed_s * (last - trainer.progress.step),
            plan=PlanSummary.of(batch.plan),
            bytes_by_site={site: payload_bytes(traffic, site) for site in TRAFFIC},
            batch=batch.batch.digest,
            traffic=traffic,
            offloaded_bytes=offloaded_bytes,
            padding_tokens=padding_tokens,
            compiled_graphs=trainer.compiled.graphs,
            plan_wait_s=batch.waited_s,
            held_out_loss=held_out_loss,
            mean_steps_late=batch.batch.mean_steps_late,
            most_steps_late=batch.batch.most_steps_late,
            num_waiting=batch.batch.num_waiting,
            num_again=batch.batch.num_again,
            num_to_try_again=outcome.verdict.num_waiting,
            num_set_aside=len(trainer.guard.retries.set_aside),
            checkpoint_stop_s=stop_s,
            checkpoint_write_s=write_s,
            relayout_s=relayout_s,
            relayout_bytes=relayout_bytes,
            snapshot=trainer.snapshots.told(),
            ended_s=time.time(),
            model_flops=trainer.shape.model_flops(batch.plan.lengths),
        )
        if batch.calibrated is not None and batch.calibrated.proposal is not None:
            text, fields = event_of(batch.calibrated.proposal)
            self.log("cost model", f"from step {report.step + 1} on: {text}", **fields)
        if self._watch is not None:
            self._log_advice(self._watch.observe(batch.plan.lengths))
        self._log_skipped(batch.batch, outcome.verdict)
        if trainer.directory is not None:
            with (trainer.directory / "telemetry.jsonl").open("a") as telemetry:
                telemetry.write(report.to_json() + "\n")
        if self._report is not None:
            self._report(report)

    def _log_advice(self, found: Iterable[Advice]) -> None:
        for advice in found:
            layout = fields_of(advice.layout)
            text = f"another layout would pay: {advice.reason}"
            self.log("layout advice", text, layout=layout, saves_s=advice.saves_s)
            policy = self._trainer.config.advise_layout
            if policy is not None and policy.moves:
                self._trainer.relayout.wish(advice.layout, advice.reason)

    def _log_skipped(self, batch: Batch, verdict: Verdict) -> None:
        if verdict.commits:
            return
        waiting = f"{verdict.num_waiting:,} sequences wait to be tried again"
        self.log("skipped", f"{verdict.fault}: no update; {waiting}", batch=batch.digest, num_again=batch.num_again)
        if gone := verdict.set_aside:
            text = f"{names_of(gone)}: {len(gone):,} sequences are not tried again"
            self.log("set aside", text, sequences=[sequence.identity for sequence in gone])

    def _log_compiled(self, padding: float) -> None:
        """Tell what rank 0 compiled in this step, if anything."""
        compiled = self._trainer.compiled
        if compiled.graphs > self._told_graphs:
            self._told_graphs = compiled.graphs
            text = (
                f"{compiled.graphs} graphs for {len(compiled.token_counts)} numbers of tokens in {compiled.seconds:.1f} s so "
                f"far; padding to them adds {padding:.1%} tokens to this step"
            )
            self.log("compiled", text, graphs=compiled.graphs, seconds=compiled.seconds)


def _layout_watch(trainer: "Trainer") -> LayoutWatch | None:
    """What watches the lengths of batches, on rank 0 of a run that asks for it."""
    config, policy = trainer.config, trainer.config.advise_layout
    if policy is None or trainer.rank != 0:
        return None
    name = torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else ""
    shape = config.model.shape(trainer.built.model.vocabulary)
    return layout_watch(config, policy, shape, trainer.groups.world.nodes, name)


class _Clock:
    """Seconds of each step, and a smoothed value to estimate the time left."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._smoothed: float | None = None

    def tick(self) -> tuple[float, float]:
        """Seconds since the last tick, and their moving average."""
        now = time.monotonic()
        elapsed, self._last = now - self._last, now
        self._smoothed = elapsed if self._smoothed is None else 0.8 * self._smoothed + 0.2 * elapsed
        return elapsed, self._smoothed

    def leave_out(self, seconds: float) -> None:
        """Count the last ``seconds`` to no step."""
        self._last += seconds
