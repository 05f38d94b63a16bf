"""Forward and backward of micro-batches: where a model meets the plan."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evermesh.parallelism.attention.kernels import kernel_for
from evermesh.parallelism.attention.micro_batch import MicroBatchAttention
from evermesh.parallelism.batch_plan import MicroBatch
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.parallelism.pipeline.executor import PipelineExecutor
from evermesh.parallelism.pipeline.links import Activations
from evermesh.parallelism.tensor.loss import cross_entropy
from evermesh.parallelism.tensor.sharding import padded_length
from evermesh.parallelism.tensor.tokens import pad_tokens, without_padding
from evermesh.runtime.memory.policy import ActivationMemory
from evermesh.runtime.model.decoder import Decoder, keep_activations
from evermesh.runtime.model.stages import Part
from evermesh.runtime.stopwatch import Stopwatch

if TYPE_CHECKING:
    from evermesh.fault.injection.hook import Injector


@dataclass(frozen=True, slots=True)
class LocalMicroBatch:
    """This rank's tokens of one micro-batch, piece after piece."""

    plan: MicroBatch
    tokens_T: Tensor
    """Token ids, int64."""
    targets_T: Tensor
    """The next token of each, int64."""
    positions_T: Tensor
    """Position of each token in its own sequence, int64."""
    counts_T: Tensor
    """1 where the target counts in the loss, else 0; float32."""


@dataclass(frozen=True, slots=True)
class LocalBatch:
    """What one rank processes of a batch, and what it has to know of the whole of it."""

    micro_batches: tuple[LocalMicroBatch, ...]
    """In the order of the plan."""
    lengths: tuple[int, ...]
    """Tokens of every sequence of the batch."""
    num_counted: int
    """Tokens of the batch that count in the loss, over all ranks."""
    identities: tuple[str, ...] = ()
    """What every sequence of the batch is; for experts that are balanced by document."""
    step: int = 0
    seed: int = 0


class MicroBatchRunner:
    """Runs one rank's micro-batches through its model and leaves the gradients in the parameters.

    Args:
        model: this rank's model, after ``apply_tensor_parallel`` where ranks share one.
        hdp: the HDP ranks, over which rings are.
        tp: the ranks that share the model and run the same micro-batches together; None: nobody does.
        pipeline: runs the stages of this rank; None: the model is whole.
        parts: the parts of the model that this rank holds, by stage.
        memory: what becomes of activations; None: all are kept.
        buckets: numbers of tokens that micro-batches are padded to; none: as few as ``tp`` needs.
    """

    def __init__(
        self,
        model: Decoder,
        hdp: Communicator,
        tp: Communicator | None = None,
        pipeline: PipelineExecutor | None = None,
        parts: Mapping[int, Part] | None = None,
        memory: ActivationMemory | None = None,
        buckets: Sequence[int] = (),
    ) -> None:
        self.memory, self.buckets = memory, tuple(buckets)
        self.model, self.hdp, self.tp = model, hdp, tp or Communicator()
        self.call: Callable[..., Tensor] = model
        """What runs the model forward."""
        self.pipeline, self.parts = pipeline, dict(parts or {0: model.parts[0]})
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.kernel = kernel_for(weight.device, weight.dtype)
        self.stopwatch: Stopwatch | None = None
        """Takes the time of every micro-batch, where there is no pipeline; None: nobody wants to know."""
        self.faults: Injector | None = None
        """What this rank does to itself, in a run that was given faults."""

    def accumulate(self, batch: LocalBatch) -> tuple[Tensor, list[TokenContext]]:
        """Add this rank's gradients of the mean loss; returns its part of that loss, a float64 scalar, and what layers
        with experts counted in every micro-batch.

        Every token is weighted by one over ``num_counted``, so the sum over ranks is the same for every plan; of ranks
        that share a model only the first returns its loss, the others 0. Collective over them, over the members of every
        ring, over the ranks that share experts, and over the pipeline, in the order of the plan.
        """
        runs = [_Run(self, batch, micro_batch) for micro_batch in batch.micro_batches]
        if self.pipeline is None:
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            if self.stopwatch is not None:
                self.stopwatch.start()
            for run in runs:
                loss = run.forward(self.parts[0], None)
                self._backward(loss, is_last=run is runs[-1])
                total += loss.detach()
                if self.stopwatch is not None:
                    self.stopwatch.lap()
        else:
            stages = {stage: _Stage(part, runs) for stage, part in self.parts.items()}
            total = self.pipeline.run(stages, self._activations(batch)).loss
        contexts = [run.context for run in runs]
        return (total if self.tp.rank == 0 else torch.zeros_like(total)), contexts

    def _backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradients of ``loss``; ``is_last``: of this rank's part of the step."""
        loss.backward()

    @torch.no_grad()
    def evaluate(self, batch: LocalBatch) -> Tensor:
        """This rank's part of the mean loss of ``batch``, as ``accumulate`` returns it; leaves nothing behind.

        Collective as ``accumulate`` is, but only forward.
        """
        runs = [_Run(self, batch, micro_batch) for micro_batch in batch.micro_batches]
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.pipeline is None:
            for run in runs:
                total += run.forward(self.parts[0], None)
        else:
            stages = {stage: _Stage(part, runs) for stage, part in self.parts.items()}
            total = self.pipeline.evaluate(stages, self._activations(batch))
        return total if self.tp.rank == 0 else torch.zeros_like(total)

    def _activations(self, batch: LocalBatch) -> Activations:
        """What the stages hand on: this rank's part of the tokens of every micro-batch, padded."""
        ranks, counts = self.tp.size, (run.plan.num_tokens for run in batch.micro_batches)
        sizes = (padded_length(count, ranks, self.buckets) // ranks for count in counts)
        return Activations(tuple(sizes), self.model.config.hidden, self.dtype, self.device)


class _Run:
    """One micro-batch on its way through the parts of the model that this rank holds."""

    def __init__(self, runner: MicroBatchRunner, batch: LocalBatch, micro_batch: LocalMicroBatch) -> None:
        self.runner, self.micro_batch, self.num_counted = runner, micro_batch, max(1, batch.num_counted)
        self.context = TokenContext(
            micro_batch.plan,
            batch.lengths,
            batch.identities,
            num_tokens=sum(batch.lengths),
            step=batch.step,
            seed=batch.seed,
            buckets=runner.buckets,
            hdp=runner.hdp,
            tp=runner.tp,
        )
        attend = MicroBatchAttention(micro_batch.plan, batch.lengths, runner.kernel, runner.hdp)
        self.attend = without_padding(attend, micro_batch.plan.num_tokens)
        memory = runner.memory
        self.run_block = memory.blocks_of(micro_batch.plan, attend) if memory is not None else keep_activations

    def forward(self, part: Part, x_tC: Tensor | None) -> Tensor:
        """Activations [t, C] behind ``part``; behind the last, its part of the mean loss of the batch, a scalar."""
        runner, num_tokens = self.runner, self.micro_batch.plan.num_tokens
        tokens_T, positions_T = self._padded
        y = runner.call(
            tokens_T,
            positions_T,
            self.attend,
            run_block=self.run_block,
            context=self.context,
            part=part,
            x_TC=x_tC,
        )
        if runner.faults is not None:
            y = runner.faults.through(y)
        if not part.is_last:
            return y
        logits_TV = y[:num_tokens].to(torch.promote_types(y.dtype, torch.float32))
        targets_T, counts_T = (
            tensor.to(runner.device, non_blocking=True)
            for tensor in (self.micro_batch.targets_T, self.micro_batch.counts_T)
        )
        losses_T = cross_entropy(logits_TV, targets_T, runner.model.vocabulary, runner.tp)
        loss = (losses_T * counts_T).sum() / self.num_counted
        return loss if runner.faults is None else runner.faults.spoil(loss)

    @functools.cached_property
    def _padded(self) -> tuple[Tensor, Tensor]:
        """Tokens and positions on the device, with padding."""
        tokens_T, positions_T = (
            pad_tokens(tensor.to(self.runner.device, non_blocking=True), self.runner.tp.size, self.runner.buckets)
            for tensor in (self.micro_batch.tokens_T, self.micro_batch.positions_T)
        )
        return tokens_T, positions_T


@dataclass(frozen=True, slots=True)
class _Stage:
    """A part of the model, and the micro-batches of a step."""

    part: Part
    runs: Sequence[_Run]

    def forward(self, micro_batch: int, x_tC: Tensor | None, /) -> Tensor:
        """See ``pipeline.executor.Stage``."""
        return self.runs[micro_batch].forward(self.part, x_tC)
