"""Runs the blocks of a model so that their activations go where the layout says.

Source: MEMO (arXiv 2407.12117, section 4.1): the input and the attention output of a block wait in host memory; of the
rest, some tokens do and the others are computed again, token by token. Here a block has two halves, attention and what
follows it, and each is a checkpoint (``torch.utils.checkpoint``) whose input waits on the host. When the backward pass
gets there, norms, rotations and gates are computed again for all tokens, matrix products for those that were not moved,
and attention never: so nothing is sent over rings again. What an expert sees is not a matter of tokens of one rank, so a
mixture is computed again whole, with its communication.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from evermesh.parallelism.attention.micro_batch import MicroBatchAttention
from evermesh.parallelism.batch_plan import MicroBatch
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.tensor.tokens import without_padding
from evermesh.runtime.memory.host import HostCopy, HostMemory
from evermesh.runtime.memory.products import Products, Tape
from evermesh.runtime.model.blocks import Attend
from evermesh.runtime.model.rotary import Rotation


def recompute_activations(_: int, block: nn.Module, *inputs: object) -> Tensor:
    """Runs a block, keeps its input, and computes the rest again in the backward pass."""
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


class ActivationMemory:
    """What one rank does with the activations of its blocks.

    Args:
        layout: says which policy each block has.
        products: was applied to the model.
        device: that computes.
    """

    def __init__(self, layout: Layout, products: Products, device: torch.device) -> None:
        self.layout, self.products, self.host = layout, products, HostMemory(device)
        self._counted_bytes = 0

    def blocks_of(self, micro_batch: MicroBatch, attention: MicroBatchAttention) -> "MicroBatchBlocks":
        """What runs blocks for one micro-batch, whose attention is ``attention``."""
        return MicroBatchBlocks(self, micro_batch, attention)

    def take_bytes(self, world: Communicator) -> int:
        """Bytes that all ranks moved to their hosts since the last call. Collective, where any block offloads."""
        if "offload" not in self.layout.activation_policies:
            return 0
        moved = torch.tensor(self.host.bytes_out - self._counted_bytes, device=self.host.device)
        self._counted_bytes = self.host.bytes_out
        world.all_reduce(moved, "bookkeeping")
        return int(moved)


class MicroBatchBlocks:
    """Runs the blocks of a model for one micro-batch; blocks that belong together in their order."""

    def __init__(self, memory: ActivationMemory, micro_batch: MicroBatch, attention: MicroBatchAttention) -> None:
        self._memory, self._micro_batch, self._attention = memory, micro_batch, attention
        self._last: Tape | None = None

    def __call__(
        self,
        layer: int,
        block: nn.Module,
        x_TC: Tensor,
        rotation_TD: Rotation,
        attend: Attend,
        context: TokenContext | None,
    ) -> Tensor:
        """Output [T, C] of the block of ``layer``. Collective as the block is, and so is its backward pass."""
        inputs = x_TC, rotation_TD, attend, context
        policy = self._memory.layout.activations_of(layer)
        if policy == "keep" or self._micro_batch.recompute == "none" or not torch.is_grad_enabled():
            return block(*inputs)
        if policy == "recompute":
            return recompute_activations(layer, block, *inputs)
        return block(*inputs, half=self._half)

    def _half(self, function: Any, x_TC: Tensor, attend: Attend | None, *others: Any) -> Tensor:
        memory = self._memory
        memory.host.begin_group()
        tape = self._last = Tape(memory.host, self._micro_batch.offload, self._last)
        if attend is not None:
            attend = without_padding(memory.products.attend(self._attention, tape), self._micro_batch.num_tokens)

        def run(x_TC: Tensor) -> Tensor:
            return function(x_TC, attend, *others)

        def contexts() -> tuple[Any, Any]:
            return memory.products.on(tape, play=False), memory.products.on(tape, play=True)

        with saved_tensors_hooks(tape.put_input, HostCopy.take):  # of the input alone: checkpoint hides what is inside
            return checkpoint(run, x_TC, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


__all__ = ["ActivationMemory", "MicroBatchBlocks", "recompute_activations"]
