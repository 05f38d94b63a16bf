"""The loss on documents that are never trained on."""

from typing import NamedTuple

from evermesh.runtime.data import Batch
from evermesh.runtime.feed import BatchFeed
from evermesh.runtime.micro_batch import LocalBatch, MicroBatchRunner
from evermesh.runtime.model.building import BuiltModel
from evermesh.runtime.process_group import Groups


class EvaluationResult(NamedTuple):
    """One evaluation, the same on every rank."""

    loss: float
    """Mean per counted token, nats."""
    num_tokens: int
    """All held-out tokens, counted in the loss or not."""


class Evaluation:
    """Runs the held-out batches forward through the model, planned and divided like batches of training.

    Args:
        batches: what is held out.
        built: the model.
        runner: of this rank's micro-batches.
        groups: of all ranks.
    """

    def __init__(self, batches: tuple[Batch, ...], built: BuiltModel, runner: MicroBatchRunner, groups: Groups) -> None:
        self._batches, self._built, self._runner, self._groups = batches, built, runner, groups
        self._local: list[LocalBatch] | None = None

    def run(self, feed: BatchFeed) -> EvaluationResult:
        """Evaluate the model as it is now. Collective; its traffic is of the phase "evaluate"."""
        moment = self._groups.moment
        before, moment.phase = moment.phase, "evaluate"
        if self._local is None:  # they never change: planned and read once
            self._local = feed.prepare_held_out(self._batches)
        counted = sum(batch.num_counted for batch in self._local)
        self._built.begin_forward()
        parts = [self._runner.evaluate(batch) * (batch.num_counted / max(1, counted)) for batch in self._local]
        self._built.end_step()
        loss = sum(parts[1:], start=parts[0])
        self._groups.world.all_reduce(loss, "scalars")
        moment.phase = before
        return EvaluationResult(loss.item(), sum(batch.num_tokens for batch in self._batches))
