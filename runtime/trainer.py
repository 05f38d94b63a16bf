"""The training loop of one process: plan, run micro-batches, synchronise, guard, update, save."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from evermesh import checkpoint
from evermesh.checkpoint.committing import step_of
from evermesh.checkpoint.errors import CheckpointNotFound
from evermesh.checkpoint.relayout import Moved
from evermesh.checkpoint.stores.places import Place
from evermesh.fault.snapshot.snapshots import Keeping
from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.layout.explain import fields_of
from evermesh.parallelism.planner import HybridPlanner, Planner
from evermesh.runtime import process_group
from evermesh.runtime.calibration import OnlineCalibration
from evermesh.runtime.compiling import Compiled
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.cost import nominal_cost, pool_of
from evermesh.runtime.data import HeldOut, Sampler, hold_out, open_sources
from evermesh.runtime.determinism import parameters_digest, use_deterministic_algorithms
from evermesh.runtime.engine import build_engine
from evermesh.runtime.evaluation import Evaluation
from evermesh.runtime.expert_balance import ExpertBalance
from evermesh.runtime.feed import BatchFeed, PlannedBatch
from evermesh.runtime.guard.integrity import Integrity, describe
from evermesh.runtime.guard.step_guard import StepGuard
from evermesh.runtime.injecting import attach
from evermesh.runtime.layout import check_layout
from evermesh.runtime.process_group import Groups
from evermesh.runtime.relayout import Move, Relayout
from evermesh.runtime.reporting import Agreed, Asked, Reporter, StepOutcome
from evermesh.runtime.saves import Saves
from evermesh.runtime.schedule import learning_rate
from evermesh.runtime.snapshots import RunSnapshots
from evermesh.runtime.speeds import RankSpeeds
from evermesh.runtime.starting import begin
from evermesh.runtime.state import Progress, TrainingState
from evermesh.runtime.stopwatch import Stopwatch
from evermesh.runtime.telemetry import StepReport

if TYPE_CHECKING:
    from evermesh.fault.injection.hook import Injector
    from evermesh.fault.injection.schedule import Phase

Reason = Literal["finished", "stop_at", "asked", "regroup"]
_ASKED: tuple[Agreed | None, ...] = (None, "save", "stop", "regroup", "move")


@dataclass(frozen=True, slots=True)
class FitResult:
    """Where and why training ended."""

    step: int
    reason: Reason
    checkpoint: Place | None


class Trainer:
    """Trains a decoder on as many workers as the process group has; without a group, in this process alone.

    Every worker makes one with the same configuration and calls ``fit``. The layout's ``pp`` x ``hdp`` x ``tp`` must equal
    the number of workers.

    Args:
        config: what to train.
        directory: where telemetry, events and checkpoints go; None writes nothing.
        resume: continue from the newest checkpoint of ``directory``.
        report: called on rank 0 after every step.
        beat: called on every rank after every step with the step, its wall time and the part of it before the ranks
            met to sum gradients, seconds; on a GPU that part ends when the kernels are issued.
        asked: polled on rank 0 once per step; all ranks do after that step what it returns: save, stop, leave the
            state to ranks that are started anew, or go on with these changes to the layout.
        planner: what plans the batches; by default ``HybridPlanner``. With one, the layout stays as it is.
        faults: what this rank is to do to itself, in a run that was given faults.
        keeping: where this rank leaves snapshots; it goes on from the newest that all ranks have left there, if no
            checkpoint is newer.

    Raises:
        LayoutDoesNotFit: the layout cannot run on these workers.
        OtherRun: the checkpoint to resume from is of another model, tokenizer or data order.
        CheckpointNotFound: there is nothing to resume from.
        VocabularyTooSmall: the tokenizer has more entries than the model has rows.
        UnsupportedModel, WeightsUnusable: ``config.init_from`` holds another model, or none that can be read.
        ForeignUnusable, CheckpointMismatch, CheckpointCorrupt: so does ``config.adopt``.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        directory: Path | None = None,
        resume: bool = False,
        report: Callable[[StepReport], None] | None = None,
        beat: Callable[[int, float, float], None] | None = None,
        asked: Callable[[], Asked | None] | None = None,
        planner: Planner | None = None,
        faults: "Injector | None" = None,
        keeping: Keeping | None = None,
    ) -> None:
        self.directory, self.asked, self.faults = directory, asked, faults
        check_layout(config)
        self.device = process_group.local_device(config.device)
        if config.deterministic:
            use_deterministic_algorithms(config.seed)
        if config.device.kind == "cpu":
            torch.set_num_threads(config.device.threads)

        self.corpora = open_sources(config.data)
        evaluation = config.evaluation
        self._held_out = (
            hold_out(self.corpora, config.data, evaluation.tokens) if evaluation else HeldOut.none(self.corpora)
        )
        self.sampler = Sampler(self.corpora, config.data, config.seed, self._held_out.documents)
        self.progress = Progress(sampler=self.sampler.state_dict())
        self.guard = StepGuard(config.guard, config.max_skipped_steps, self.progress, config.seed, config.steps)
        self.compiled = Compiled()
        self._planner = planner
        self.speeds = RankSpeeds(self)
        is_restored = resume or (keeping is not None and keeping.generation > 1)  # most likely
        self.build(config, initialize=not is_restored)
        self.rank, self.workers = self.groups.world.rank, self.groups.world.size
        self.reporter = Reporter(self, report, beat)
        self.saves, self.relayout, self.snapshots = Saves(self), Relayout(self), RunSnapshots(self, keeping)
        if self.snapshots.restore():
            self._go_on()
        elif resume:
            self._resume()
        else:
            begin(self, is_initialized=not is_restored)
        self.plan: BatchPlan | None = None
        """Of the batch that is being trained."""

    def build(self, config: TrainConfig, *, initialize: bool, before: Groups | None = None) -> None:
        """Make everything that depends on the layout. Collective.

        ``before`` are the groups of the layout that this one takes the place of, and the state is then to be restored;
        ``initialize`` gives the weights their first values.
        """
        self.config, model = config, config.model
        self.groups = process_group.communicators(
            config.timeout_s,
            config.layout,
            experts=model.moe is not None,
            tied=model.tied_embeddings,
            before=before,
        )
        vocabulary = model.rows(self.corpora[0].vocabulary)
        self.engine = build_engine(config, vocabulary, self.groups, self.device, initialize=initialize)
        self.built, self.optimizer, self.runner = self.engine.built, self.engine.optimizer, self.engine.runner
        if config.compile is not None:
            self.compiled.apply(self.built.model, config.buckets, self.groups.moment)
        self.evaluation = Evaluation(self._held_out.batches, self.built, self.runner, self.groups)
        self.integrity = Integrity(config.guard, self.built, self.groups)
        self.shape = model.shape(vocabulary)
        self.cost = config.cost or nominal_cost(config, self.shape)
        """That the batch under way was planned with."""
        pool = pool_of(self.groups.world.nodes, config.layout, self.cost)
        self.planner = self._planner or HybridPlanner(config.layout, self.cost, pool)
        self.calibration = self._calibration()
        self.experts = ExpertBalance(self.built, model, self.groups.ep, config.layout.hot_experts, self.progress)
        self.shards = self.engine.shards
        if self.faults is not None:
            attach(self.faults, self.engine)
        self.state = TrainingState(self.optimizer, self.shards, self.progress, self._identity(), self.groups.host)

    def dismantle(self) -> None:
        """Let go of the model and all that holds it, so that its memory is free before another is built."""
        del (
            self.engine,
            self.built,
            self.optimizer,
            self.runner,
            self.evaluation,
            self.experts,
            self.integrity,
            self.state,
        )

    @property
    def plans_itself(self) -> bool:
        """Whether the planner is made for the layout, and not given."""
        return self._planner is None

    def fit(self) -> FitResult:
        """Train to ``stop_at``, to the end of the run, or until asked to stop; then save. Collective.

        Asked to regroup, it saves only what could not be left in memory.
        """
        last = min(self.config.steps, self.config.stop_at or self.config.steps)
        reason: Reason = "finished" if last == self.config.steps else "stop_at"
        text = f"step {self.progress.step} of {self.config.steps}, {self.workers} workers"
        self._log("started", text, layout=fields_of(self.config.layout))
        if (memory := self.engine.memory) is not None:
            self._log("memory", f"{memory}", **dataclasses.asdict(memory))
        if self.progress.step >= last:
            return self._end(reason, self._newest_checkpoint())
        if self.device.type == "cpu" and "offload" in self.config.layout.activation_policies:
            text = (
                "layout.activations offloads, but a CPU device is host memory: everything is moved and nothing is saved"
            )
            self._log("memory", text)
        while True:  # from one layout to the next
            self.groups.control.moment.step = self.progress.step
            with (
                self.groups.listen(self.reporter.ledger),
                self._feed() as feed,
                self.saves.running(last),
                self.snapshots.running(),
            ):
                ended = self._train(feed, last, reason)
            if isinstance(ended, FitResult):
                return ended
            self.move_to(ended)

    def move_to(self, move: Move) -> Moved:
        """Go on with another layout, without a checkpoint and without a stop. Collective; between steps, as ``fit`` does.

        Raises:
            LayoutDoesNotFit: the trainer cannot run it. Nothing has changed.
        """
        moved = self.relayout.go(move)
        self._go_on()
        self.reporter.take_layout()
        return moved

    def _feed(self) -> BatchFeed:
        return BatchFeed(
            self.sampler,
            self.corpora,
            self.planner,
            self.config.layout,
            self.groups.control,
            self.groups.readers,
            self.calibration,
            self.config.steps,
            self.guard.retries.due,
            self.speeds.apply,
        )

    def _calibration(self) -> OnlineCalibration | None:
        """What calibrates the cost model, if this run wants that."""
        policy = self.config.calibrate
        if policy is None:
            return None
        if not isinstance(self.planner, HybridPlanner):
            raise TypeError(
                f"train.calibrate changes the cost model of HybridPlanner, but {type(self.planner).__name__} plans. "
                "Leave train.calibrate out, or pass no planner."
            )
        self.runner.stopwatch = Stopwatch(self.device)
        return OnlineCalibration(self.planner, self.config.layout, policy, self.groups.control)

    def _train(self, feed: BatchFeed, last: int, reason: Reason) -> FitResult | Move:
        """Train until the end, or until a step behind which another layout takes over."""
        every = self.config.checkpoint.every
        self.reporter.begin()
        self.relayout.note_step_begins()
        while True:
            self.groups.moment.phase = "data"
            batch = feed.next(last=self.progress.step + 1 == last)
            outcome = self.train_step(batch)
            held_out_loss = self._evaluate(feed, last)
            self.reporter.report_step(batch, outcome, last, held_out_loss)
            self.snapshots.take()  # last: a step that others can go on from has been reported
            step, ends = self.progress.step, outcome.asked == "stop" or self.progress.step == last
            leaves = outcome.asked == "regroup" and not ends
            is_due = outcome.asked == "save" or (every and step % every == 0)
            is_due = (leaves and not self.snapshots.finish()) or is_due
            if ends:
                return self._end("asked" if step < last else reason, self.saves.save(wait=True))
            saved = self.saves.save_if_possible(asked=outcome.asked is not None) if is_due else None
            if leaves:
                self.saves.finish_if_possible()
                return self._end("regroup", saved)
            if outcome.asked == "move":
                self.saves.finish_if_possible()  # what writes it is made for this rank's part in this layout
                return self.relayout.agree()

    def train_step(self, batch: PlannedBatch) -> StepOutcome:
        """Run one optimizer step. Collective; all ranks agree on the outcome."""
        began_s, self.plan = time.monotonic(), batch.plan
        if batch.calibrated is not None:
            self.cost = batch.calibrated.cost
        self.progress.step += 1
        self.groups.moment.begin_step(self.progress.step)
        self.engine.begin_step()
        self.experts.begin_step()
        self.reach("forward")
        with self.integrity.watching(self.progress.step):
            local_loss, contexts = self.runner.accumulate(batch.local)
        self.experts.end_step()
        self.reach("all-reduce")
        self.groups.moment.reach("sum")
        compute_s = time.monotonic() - began_s
        loss, grad_norm, asked = self._synchronize(local_loss)
        verdict = self.guard.judge(self.progress.step, loss, grad_norm, batch.batch, self._suspicion())
        if verdict.commits:
            self.progress.updates += 1
            self.optimizer.step(self.learning_rate() * verdict.lr_scale, self._clip(grad_norm))
            self.experts.learn(contexts, self.groups.world, self.device)
        self.engine.end_step()
        self.progress.sampler = batch.sampler_state
        self._learn_times(batch)
        return StepOutcome(loss, grad_norm, verdict, asked, compute_s)

    def _suspicion(self) -> str | None:
        """What checks of this step have found that forbids its update; None: nothing. Collective.

        Raises:
            CorruptionFound: such a run is to end.
        """
        found = self.integrity.findings(self.progress.step)
        for finding in found:
            self._log("finding", describe(finding), finding=finding.model_dump(mode="json"))
        return self.integrity.suspicion(found)

    def reach(self, phase: "Phase") -> None:
        """This rank is at a place where a run that was given faults may have one."""
        if self.faults is not None:
            self.faults.reach(phase, self.progress.step)

    def _learn_times(self, batch: PlannedBatch) -> None:
        """Behind a step: what it took, and the cost model for the next one."""
        if self.calibration is not None and batch.calibrated is not None and self.runner.stopwatch is not None:
            self.calibration.note(batch.plan, self.runner.stopwatch.take())
            self.progress.calibration = batch.calibrated.state

    def _evaluate(self, feed: BatchFeed, last: int) -> float | None:
        """The loss on the held-out documents, if this step is one to evaluate. Collective."""
        config, step = self.config.evaluation, self.progress.step
        if config is None or (step % config.every and step != last):
            return None
        started_s = time.monotonic()
        result = self.evaluation.run(feed)
        took_s = time.monotonic() - started_s
        self.reporter.leave_out(took_s)
        text = f"loss {result.loss:.4f} on {result.num_tokens:,} held-out tokens in {took_s:.2f} s"
        self._log("evaluated", text, loss=result.loss, num_tokens=result.num_tokens)
        return result.loss

    def save(self) -> Place | None:
        """Write a checkpoint of this step and return when it is durable: its directory, None when the trainer writes
        nothing. Collective."""
        return self.saves.save(wait=True)

    def _asked(self) -> Agreed | None:
        """What all ranks are to do behind this step, on rank 0. A new layout waits while something else is asked for."""
        asked = self.asked() if self.asked is not None else None
        if isinstance(asked, Mapping):
            self.relayout.wish(asked, "as asked")
        elif asked is not None:
            return asked
        return "move" if self.relayout.is_wished else None

    def _synchronize(self, local_loss: Tensor) -> tuple[float, float, Agreed | None]:
        """Sum gradients, loss and requests over all ranks: (loss, gradient norm, what was asked). Collective.

        A rank whose checkpoint could not be written adds more than any request, so all of them learn of it.
        """
        square = self.engine.sum_gradients()
        asked = _ASKED.index(self._asked()) if self.rank == 0 else 0
        asked += len(_ASKED) if self.saves.has_failed() else 0
        numbers = (local_loss.new_tensor(number) for number in (float(asked), self.snapshots.vote()))
        scalars = torch.stack([local_loss, square, *numbers])
        self.groups.world.all_reduce(scalars, "scalars")
        loss, square_of_norm, request, votes = scalars.tolist()
        self.snapshots.count(votes)
        if request >= len(_ASKED):
            self.saves.finish_if_possible()
        return loss, square_of_norm**0.5, _ASKED[int(request) % len(_ASKED)]

    def learning_rate(self) -> float:
        """Of the last update."""
        return learning_rate(self.config.optimizer, self.progress.updates, self.config.steps)

    def _clip(self, grad_norm: float) -> float:
        limit = self.config.optimizer.clip_norm
        return 1.0 if limit is None or grad_norm <= limit else limit / grad_norm

    def _identity(self) -> dict[str, Any]:
        return {
            "model": self.config.model.model_dump(mode="json"),
            "vocabulary": self.corpora[0].vocabulary,
            "tokenizer": self.corpora[0].tokenizer_digest,
            "dtype": self.config.dtype,
            "seed": self.config.seed,
        }

    def _resume(self) -> None:
        path = self._newest_checkpoint()
        if path is None:
            raise CheckpointNotFound(
                self.config.checkpoint.directory(self.directory or Path()),
                "no complete checkpoint to resume from; launch the run anew",
            )
        started_s = time.monotonic()
        if self.faults is not None:
            self.faults.reach("restore", step_of(path))
        loaded = self.state.restore(path)
        self._go_on()
        text = f"from {path.name}, saved by {loaded.world_size}, on {self.workers} workers"
        self._log("resumed", text, load_s=time.monotonic() - started_s)

    def _go_on(self) -> None:
        """Put everything where ``progress`` says, after it was restored or another layout has taken over."""
        self.sampler.load_state_dict(self.progress.sampler)
        self.guard.restore()
        if self.calibration is None or not self.calibration.restore(self.progress.calibration):
            self.progress.calibration = {}
        self.experts.tell_routers()

    def _newest_checkpoint(self) -> Place | None:
        return checkpoint.latest(self.config.checkpoint.directory(self.directory)) if self.directory else None

    def _end(self, reason: Reason, saved: Place | None) -> FitResult:
        """Collective: says how the run ended, and with which parameters."""
        self.reporter.end()
        if (unfinished := self.guard.unfinished()) is not None:
            self._log("not trained", unfinished[0], **unfinished[1])
        digest = parameters_digest(self.optimizer.owned_state(), self.groups.host)
        text = f"after step {self.progress.step} ({reason}), parameters {digest}"
        self._log("finished" if reason == "finished" else "stopped", text, parameters=digest)
        return FitResult(self.progress.step, reason, saved)

    def _log(self, kind: str, text: str, **fields: Any) -> None:
        self.reporter.log(kind, text, **fields)
