"""The tokens of a micro-batch on a tensor-parallel group, and the differentiable collectives between its layouts.

Shape legend: T tokens, a multiple of n ranks (padded); t = T / n of them on each rank; C channels; H heads; D head size.

Gathering is the adjoint of reducing and scattering: the backward pass of one is the other (Korthikanti et al., arXiv
2205.05198, section 4.2.2). A group whose micro-batch has no token sends nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.tensor.sharding import padded_length

FORWARD, BACKWARD = "tensor forward", "tensor backward"
"""Call sites."""
Attend = Callable[..., Tensor]
"""(q [T, H, D], k [T, K, D], v [T, K, D], *, window) -> [T, H, D]."""


def gather_tokens(x_tC: Tensor, communicator: Communicator) -> Tensor:
    """All tokens [T, C] from every rank's own [t, C], differentiable. Collective, forward and backward."""
    return _Gather.apply(x_tC, communicator)


def scatter_tokens(x_TC: Tensor, communicator: Communicator) -> Tensor:
    """This rank's tokens [t, C] of the sum over the ranks of [T, C], differentiable. Collective, forward and backward."""
    return _Scatter.apply(x_TC, communicator)


def pad_tokens(x_T: Tensor, ranks: int, buckets: Sequence[int] = ()) -> Tensor:
    """``x_T`` with zeros up to ``padded_length`` tokens."""
    return F.pad(x_T, (0, padded_length(x_T.shape[0], ranks, buckets) - x_T.shape[0]))


def without_padding(attend: Attend, num_tokens: int) -> Attend:
    """Attention that sees the first ``num_tokens`` tokens only; what it returns for the others is zero."""

    def attend_to_tokens(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, /, *, window: int | None = None) -> Tensor:
        padding = q_THD.shape[0] - num_tokens
        if padding == 0:
            return attend(q_THD, k_TKD, v_TKD, window=window)
        out_THD = attend(*(x[:num_tokens] for x in (q_THD, k_TKD, v_TKD)), window=window)
        return F.pad(out_THD, (0, 0, 0, 0, 0, padding))

    return attend_to_tokens


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_tC: Tensor, communicator: Communicator) -> Tensor:
        ctx.communicator = communicator
        return _all_gather(x_tC, communicator, FORWARD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grads[0], ctx.communicator, BACKWARD), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, communicator: Communicator) -> Tensor:
        ctx.communicator = communicator
        return _reduce_scatter(x_TC, communicator, FORWARD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grads[0], ctx.communicator, BACKWARD), None


def _all_gather(x_tC: Tensor, communicator: Communicator, call_site: str) -> Tensor:
    whole = x_tC.new_empty(x_tC.shape[0] * communicator.size, *x_tC.shape[1:])
    if whole.numel():
        communicator.all_gather(whole, x_tC.contiguous(), call_site)
    return whole


def _reduce_scatter(x_TC: Tensor, communicator: Communicator, call_site: str) -> Tensor:
    own = x_TC.new_empty(x_TC.shape[0] // communicator.size, *x_TC.shape[1:])
    if own.numel():
        communicator.reduce_scatter(own, x_TC.contiguous(), call_site)
    return own
