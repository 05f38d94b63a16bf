"""The oracle of every parity test: one process, one document at a time, attention written out."""

import math

import torch
from torch import Tensor


def plain_attention(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, /, *, window: int | None = None) -> Tensor:
    """Causal attention of one document with the whole score matrix; grouped queries by repetition."""
    group = q_THD.shape[1] // k_TKD.shape[1]
    k_THD, v_THD = (x.repeat_interleave(group, dim=1) for x in (k_TKD, v_TKD))
    scores_HQK = torch.einsum("qhd,khd->hqk", q_THD, k_THD) / math.sqrt(q_THD.shape[-1])
    hidden = torch.ones(scores_HQK.shape[-2:], dtype=torch.bool).triu(1)
    if window is not None:
        hidden |= ~torch.ones_like(hidden).triu(1 - window)
    return torch.einsum("hqk,khd->qhd", scores_HQK.masked_fill(hidden, float("-inf")).softmax(-1), v_THD)


def gradient(tensor: Tensor) -> Tensor:
    """The gradient that a backward pass left."""
    assert tensor.grad is not None
    return tensor.grad


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-300)).item()
