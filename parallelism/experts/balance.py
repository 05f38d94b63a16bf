"""What keeps the experts of a layer evenly loaded. All of it is decided per document or from the counts of a whole step.

Shape legend: T tokens of this rank, K experts per token, E experts, D documents, N tokens of all their documents.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.experts.documents import TokenContext

CALL_SITE = "expert loads"


class ExpertLoads:
    """Counts of one step: how many tokens of this rank chose each expert, by layer.

    Args:
        layers: the layers of the whole model that have experts, ascending; those that this rank does not hold count none.
        experts: E.
        device: where the counts of the layers are.
    """

    def __init__(self, layers: Sequence[int], experts: int, device: torch.device) -> None:
        self.layers = tuple(layers)
        self.counts_LE = torch.zeros(len(self.layers), experts, dtype=torch.int64, device=device)

    def add(self, context: TokenContext) -> None:
        """Add what the layers counted for one micro-batch, after its forward pass."""
        for layer, counts_E in context.loads.items():
            self.counts_LE[self.layers.index(layer)] += counts_E

    def take(self, *communicators: Communicator) -> Tensor:
        """The sums over all ranks, [L, E], in host memory, and begin anew. Collective over each communicator in turn."""
        for communicator in communicators:
            communicator.all_reduce(self.counts_LE, CALL_SITE)
        taken_LE = self.counts_LE.cpu().clone()
        self.counts_LE.zero_()
        return taken_LE


def moved_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """The bias after a step in which ``counts_E`` tokens chose each expert: towards the mean load, by ``rate``.

    Integers decide the direction, so all ranks agree to the bit. Source: DeepSeek-V3, arXiv 2412.19437, section 2.1.2.
    """
    direction_E = (counts_E.sum() - counts_E * counts_E.shape[0]).sign()
    return bias_E + rate * direction_E.to(bias_E.dtype)


def document_losses(scores_TE: Tensor, chosen_TK: Tensor, context: TokenContext) -> Tensor:
    """The balancing loss of every token, [T]; zero for padding. Collective (see ``TokenContext.counts``).

    That of a document is the mean over its tokens: sum over experts of f P, f being the share of its tokens that chose the
    expert times E / K, and P the mean of their scores, which sum to one. Given f it is linear in the scores, so that the
    ranks of a document need nothing but its counts. Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20.
    """
    experts, per_token = scores_TE.shape[1], chosen_TK.shape[1]
    lengths_D1 = context.document_lengths(scores_TE.device).unsqueeze(1)
    f_DE = context.counts(chosen_TK, experts).to(scores_TE.dtype) * experts / (per_token * lengths_D1)
    f_DE = torch.cat([f_DE, f_DE.new_zeros(1, experts)])  # the last is that of padding
    return (f_DE[context.own_documents(scores_TE.device)] * scores_TE).sum(1)


def with_loss(output_TC: Tensor, loss: Tensor, weight: float) -> Tensor:
    """``output_TC``, whose backward pass also adds the gradient of ``weight * loss``, whatever its own gradient is.

    So the loss of a layer needs no way to the end of the model, and recomputation repeats it.
    """
    return _WithLoss.apply(output_TC, loss, weight)


def within_capacity(chosen_TK: Tensor, factor: float, experts: int, layer: int, context: TokenContext) -> Tensor:
    """``chosen_TK`` with -1 where an expert has no slot left for the document. Collective (see ``TokenContext.choices``).

    A document has ceil(factor x K x length / E) slots of every expert. If more of its tokens choose it, those with the
    smallest random keys pass. Nothing but seed, step, document, position and layer decides, on any number of ranks.
    """
    whole = context.choices(chosen_TK)
    per_token = chosen_TK.shape[1]
    slots_D = torch.ceil(context.document_lengths(chosen_TK.device).double() * factor * per_token / experts)
    group_P = (whole.documents_N.unsqueeze(1) * experts + whole.chosen_NK).flatten()
    order_P = context.keys(whole, layer).repeat_interleave(per_token).argsort(stable=True)
    order_P = order_P[group_P[order_P].argsort(stable=True)]  # by document and expert, by key within these
    sorted_P = group_P[order_P]
    first_P = torch.searchsorted(sorted_P, sorted_P)
    place_P = torch.empty_like(group_P)
    place_P[order_P] = torch.arange(len(group_P), device=group_P.device) - first_P
    passes_NK = place_P.view_as(whole.chosen_NK) < slots_D[whole.documents_N].unsqueeze(1)
    return context.own_part(whole.chosen_NK.masked_fill(~passes_NK, -1), padding=-1)


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output_TC: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.like = weight, loss.detach()
        return output_TC.view_as(output_TC)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], torch.full_like(ctx.like, ctx.weight), None
