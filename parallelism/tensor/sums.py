"""The two differentiable sums around layers of which every rank holds a part, where all ranks see all tokens.

They are adjoint: summing outputs hands gradients through, and handing inputs through sums gradients (Shoeybi et al.,
Megatron-LM, arXiv 1909.08053, section 3: g and f). A micro-batch without tokens sends nothing.
"""

from typing import Any

import torch
from torch import Tensor

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.tensor.tokens import BACKWARD, FORWARD


def sum_forward(x: Tensor, communicator: Communicator) -> Tensor:
    """The sum of ``x`` over the ranks, whose gradient is the same on all of them. Collective, forward only."""
    return _SumForward.apply(x, communicator)


def sum_backward(x: Tensor, communicator: Communicator) -> Tensor:
    """``x``, the same on all ranks, whose gradient is the sum over the ranks. Collective, backward only."""
    return _SumBackward.apply(x, communicator)


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, communicator: Communicator) -> Tensor:
        return _sum(x, communicator, FORWARD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, communicator: Communicator) -> Tensor:
        ctx.communicator = communicator
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum(grads[0], ctx.communicator, BACKWARD), None


def _sum(x: Tensor, communicator: Communicator, call_site: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    if total.numel():
        communicator.all_reduce(total, call_site)
    return total
