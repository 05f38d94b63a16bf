"""Blocks of one softmax, some queries over some keys: how each is computed, and how they are joined.

Shape legend: T tokens of this rank, H query heads, K key/value heads, D head size.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from evermesh.parallelism.attention.kernels import AttentionKernel, Forward, Gradients
from evermesh.parallelism.attention.window import Band

if TYPE_CHECKING:
    import torch.distributed as dist

Mask = Band | Literal["causal", "all"]
"""What the queries of a block see of its keys; causal blocks have as many keys as queries."""


class Softmax:
    """Joins blocks of one softmax by their log-sum-exp (Milakov and Gimelshein, arXiv 1805.02867)."""

    def __init__(self, q_THD: Tensor) -> None:
        tokens, heads, _ = q_THD.shape
        dtype = accumulation_dtype(q_THD.dtype)
        self.out_THD = torch.zeros_like(q_THD, dtype=dtype)
        self.lse_HT = torch.full((heads, tokens), float("-inf"), dtype=dtype, device=q_THD.device)

    def join(self, queries: slice, out_THD: Tensor, lse_HT: Tensor) -> None:
        """Add a block that covers the given queries."""
        old = self.lse_HT[:, queries]
        new = torch.logaddexp(old, lse_HT.to(old.dtype))
        weight_old, weight_block = (torch.exp(x - new).T.unsqueeze(-1) for x in (old, lse_HT))
        self.out_THD[queries] = self.out_THD[queries] * weight_old + out_THD * weight_block
        self.lse_HT[:, queries] = new


def block_forward(
    kernel: AttentionKernel, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, mask: Mask
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one block, which is not empty."""
    if isinstance(mask, Band):
        return kernel.forward_band(q_THD, k_TKD, v_TKD, mask)
    return kernel.forward(q_THD, k_TKD, v_TKD, causal=mask == "causal")


def block_backward(kernel: AttentionKernel, grad_THD: Tensor, done: Forward, mask: Mask) -> Gradients:
    """Gradients of one block, given the joined output and log-sum-exp."""
    if isinstance(mask, Band):
        return kernel.backward_band(grad_THD, done, mask)
    return kernel.backward(grad_THD, done, causal=mask == "causal")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which blocks, and gradients from several ranks, are added up."""
    return torch.promote_types(dtype, torch.float32)


def wait(works: "Sequence[dist.Work]") -> None:
    """Return when all messages are there and out."""
    for work in works:
        work.wait()


__all__ = ["Mask", "Softmax", "accumulation_dtype", "block_backward", "block_forward", "wait"]
