"""Forward and backward of micro-batches: where a model meets the plan."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evermesh.parallelism.attention.kernels import kernel_for
from evermesh.parallelism.attention.micro_batch import MicroBatchAttention
from evermesh.parallelism.batch_plan import MicroBatch
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.tensor.loss import cross_entropy
from evermesh.parallelism.tensor.tokens import pad_tokens, without_padding
from evermesh.runtime.model.decoder import Decoder


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


class MicroBatchRunner:
    """Runs one rank's micro-batches through its model and leaves the gradients in the parameters.

    Args:
        model: this rank's model, after ``apply_tensor_parallel`` where ranks share one.
        communicator: the HDP ranks, over which rings are.
        tensor: the ranks that share the model and run the same micro-batches together; None: nobody does.
    """

    def __init__(self, model: Decoder, communicator: Communicator, tensor: Communicator | None = None) -> None:
        self.model, self.communicator, self.tensor = model, communicator, tensor or Communicator()
        weight = model.embedding.weight
        self.device = weight.device
        self.kernel = kernel_for(weight.device, weight.dtype)

    def accumulate(self, micro_batches: Iterable[LocalMicroBatch], lengths: Sequence[int], num_counted: int) -> Tensor:
        """Add this rank's gradients of the mean loss; returns its part of that loss, a float64 scalar.

        Every token is weighted by one over ``num_counted``, the counted tokens of the whole batch, so the sum over ranks
        is the same for every plan; of ranks that share a model only the first returns its loss, the others 0. Collective
        over them, and over the members of every ring, in the order of the plan.

        Args:
            micro_batches: what the plan gives to this rank, in its order.
            lengths: tokens of every sequence of the batch.
            num_counted: tokens of the batch that count in the loss, over all ranks.
        """
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for micro_batch in micro_batches:
            loss = self.loss(micro_batch, lengths) / max(1, num_counted)
            loss.backward()
            total += loss.detach()
        return total if self.tensor.rank == 0 else torch.zeros_like(total)

    def loss(self, micro_batch: LocalMicroBatch, lengths: Sequence[int]) -> Tensor:
        """Sum of the losses of the counted tokens of one micro-batch, in at least float32."""
        num_tokens, ranks = micro_batch.tokens_T.shape[0], self.tensor.size
        attend = MicroBatchAttention(micro_batch.plan, lengths, self.kernel, self.communicator)
        tokens, positions, targets, counts = (
            tensor.to(self.device, non_blocking=True)
            for tensor in (micro_batch.tokens_T, micro_batch.positions_T, micro_batch.targets_T, micro_batch.counts_T)
        )
        logits_TV = self.model(
            pad_tokens(tokens, ranks),
            pad_tokens(positions, ranks),
            without_padding(attend, num_tokens),
            recompute=micro_batch.plan.recompute == "block",
        )[:num_tokens]
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        return (cross_entropy(logits_TV, targets, self.model.vocabulary, self.tensor) * counts).sum()
