"""Cross entropy of logits whose vocabulary is shared by the ranks of a group; no rank ever holds all of them.

Shape legend: T tokens, V vocabulary, v this rank's part of it.

Source: Shoeybi et al., Megatron-LM (arXiv 1909.08053, section 3).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.tensor.sharding import part_of

CALL_SITE = "loss"


def cross_entropy(logits_Tv: Tensor, targets_T: Tensor, vocabulary: int, communicator: Communicator) -> Tensor:
    """Cross entropy [T] of every token, the same on all ranks of the group; differentiable. Collective.

    ``logits_Tv`` are those of the entries that ``part_of(vocabulary, ...)`` gives to this rank; targets count from the
    first entry of all.
    """
    if communicator.size == 1:
        return F.cross_entropy(logits_Tv, targets_T, reduction="none")
    return _CrossEntropy.apply(logits_Tv, targets_T, vocabulary, communicator)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_Tv: Tensor, targets_T: Tensor, vocabulary: int, communicator: Communicator) -> Tensor:
        own_T, is_own_T = own_entries(targets_T, vocabulary, communicator)
        largest_T = logits_Tv.amax(-1)
        _all_reduce(largest_T, communicator, maximum=True)
        shifted_Tv = logits_Tv - largest_T.unsqueeze(-1)
        target_T = shifted_Tv.gather(-1, own_T.unsqueeze(-1)).squeeze(-1) * is_own_T
        exp_Tv = shifted_Tv.exp()
        sums_2T = torch.stack([exp_Tv.sum(-1), target_T])
        _all_reduce(sums_2T, communicator)
        ctx.save_for_backward(exp_Tv / sums_2T[0].unsqueeze(-1), own_T, is_own_T)
        return sums_2T[0].log() - sums_2T[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        softmax_Tv, own_T, is_own_T = ctx.saved_tensors
        # the derivative of a token's loss is its softmax, less one at the target
        gradient_Tv = softmax_Tv.scatter_add(-1, own_T.unsqueeze(-1), -is_own_T.to(softmax_Tv.dtype).unsqueeze(-1))
        return gradient_Tv * grads[0].unsqueeze(-1), None, None, None


def own_entries(ids_T: Tensor, vocabulary: int, communicator: Communicator) -> tuple[Tensor, Tensor]:
    """Every id as an index into this rank's part of the vocabulary (0 where it is not in it), and whether it is."""
    start, stop = part_of(vocabulary, communicator.size, communicator.rank)
    is_own_T = (ids_T >= start) & (ids_T < stop)
    return (ids_T - start).masked_fill(~is_own_T, 0), is_own_T


def _all_reduce(tensor: Tensor, communicator: Communicator, *, maximum: bool = False) -> None:
    if tensor.numel():
        communicator.all_reduce(tensor, CALL_SITE, maximum=maximum)
