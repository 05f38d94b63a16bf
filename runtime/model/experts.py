"""A mixture of experts, as it runs alone on one device; ``evermesh.parallelism.experts`` shares it among ranks.

Shape legend: T tokens, C hidden size, E experts, K experts per token, R rows (copies of tokens, sorted by expert), F width of
an expert.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evermesh.parallelism.experts.balance import document_losses, with_loss, within_capacity
from evermesh.parallelism.experts.dispatch import Dispatcher
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.runtime.model.blank import Linear
from evermesh.runtime.model.config import MoeConfig


class Routing(NamedTuple):
    """What the router decided."""

    chosen_TK: Tensor
    """Experts of every token, the best first."""
    weights_TK: Tensor
    """Of their outputs, in at least float32."""
    scores_TE: Tensor
    """Scores that sum to one for every token."""


class Router(nn.Module):
    """Chooses ``top_k`` experts for every token; in at least float32, because a choice hangs on the last bits.

    The order of sums in the layers before may still tip the choice between two experts whose scores agree to rounding.
    """

    bias_E: Tensor

    def __init__(self, hidden: int, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.experts, hidden))
        self.register_buffer("bias_E", torch.zeros(config.experts, dtype=torch.float64))

    def forward(self, x_TC: Tensor) -> Routing:
        dtype = torch.promote_types(x_TC.dtype, torch.float32)
        logits_TE = F.linear(x_TC.to(dtype), self.weight.to(dtype))
        if self.config.router == "softmax":
            scores_TE = shares_TE = logits_TE.softmax(-1)
        else:
            scores_TE = logits_TE.sigmoid()
            shares_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        chosen_TK = self._eligible(scores_TE.detach()).topk(self.config.top_k, dim=-1).indices
        weights_TK = scores_TE.gather(-1, chosen_TK)
        if self.config.normalise_weights:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return Routing(chosen_TK, weights_TK * self.config.scale, shares_TE)

    def _eligible(self, scores_TE: Tensor) -> Tensor:
        """What the choice goes by: scores and bias, within the best groups (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
        scores_TE = scores_TE + self.bias_E.to(scores_TE.dtype)
        if self.config.top_groups == self.config.groups:
            return scores_TE
        scores_TGE = scores_TE.unflatten(-1, (self.config.groups, -1))
        best_TG = scores_TGE.topk(min(2, scores_TGE.shape[-1]), dim=-1).values.sum(-1)
        groups_TK = best_TG.topk(self.config.top_groups, dim=-1).indices
        is_out_TG = torch.ones_like(best_TG, dtype=torch.bool).scatter(-1, groups_TK, False)
        return scores_TGE.masked_fill(is_out_TG.unsqueeze(-1), float("-inf")).flatten(1)

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        """Keep the bias in float64 when the model changes its type: bfloat16 would lose its small steps."""
        bias_E = self.bias_E
        super()._apply(fn, recurse)
        self.bias_E = bias_E.to(self.bias_E.device)
        return self


class Experts(nn.Module):
    """The SwiGLU blocks of a rank's experts, stacked: one grouped matrix product instead of one for each."""

    def __init__(self, experts: int, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.up = nn.Parameter(torch.empty(experts, ffn, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, ffn))

    def forward(self, rows_RC: Tensor, counts: Sequence[int]) -> Tensor:
        """[R, C] to [R, C]: rows sorted by expert, ``counts[e]`` of expert e; none is fine, for one or for all."""
        hidden_RF = F.silu(grouped_linear(rows_RC, self.gate, counts)) * grouped_linear(rows_RC, self.up, counts)
        return grouped_linear(hidden_RF, self.down, counts)


class MixtureOfExperts(nn.Module):
    """Router, experts, and what balances them. Alone on one device as made; ``apply_expert_parallel`` shares it.

    Args:
        hidden: C.
        config: the experts.
        layer: index of the layer in the model; one of the things that key random choices.
        shared: the block that every token passes through; None: there is none.
    """

    def __init__(self, hidden: int, config: MoeConfig, layer: int, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.router = Router(hidden, config)
        self.dispatcher = Dispatcher(config.experts)
        self.experts = Experts(config.experts, hidden, config.ffn)
        self.shared = shared
        self.shared_gate = Linear(hidden, 1, bias=False) if config.shared_gate else None

    def forward(self, x_TC: Tensor, context: TokenContext | None = None) -> Tensor:
        """[T, C] to [T, C]. Collective where the experts, or documents, are shared; T may be 0 and differ by rank.

        ``context`` says which tokens are padding and of which documents the others are; what the layer counted is left
        in it. Without one all are tokens, and nothing is balanced.

        Raises:
            ValueError: in training without context, although the configuration balances.
        """
        routing = self.router(x_TC)
        chosen_TK = self._passing(routing.chosen_TK, context)
        out_TC = self.dispatcher(x_TC, chosen_TK, routing.weights_TK, self.experts)
        if self.shared is not None:
            shared_TC = self.shared(x_TC)
            if self.shared_gate is not None:
                shared_TC = self.shared_gate(x_TC).sigmoid() * shared_TC
            out_TC = out_TC + shared_TC
        return self._balanced(out_TC, routing, context)

    def _passing(self, chosen_TK: Tensor, context: TokenContext | None) -> Tensor:
        """The choices of tokens that are no padding and find a slot; -1 for the others."""
        if context is None:
            self._needs_no_context()
            return chosen_TK
        is_padding_T = context.own_documents(chosen_TK.device) == len(context.micro_batch.pieces)
        real_TK = chosen_TK.masked_fill(is_padding_T.unsqueeze(1), -1)
        bins_TK = real_TK.masked_fill(real_TK < 0, self.config.experts)
        context.loads[self.layer] = torch.bincount(bins_TK.flatten(), minlength=self.config.experts + 1)[:-1]
        if self.config.capacity_factor is None:
            return real_TK
        return within_capacity(chosen_TK, self.config.capacity_factor, self.config.experts, self.layer, context)

    def _balanced(self, out_TC: Tensor, routing: Routing, context: TokenContext | None) -> Tensor:
        balancing = self.config.balancing
        if context is None or balancing.kind != "document_loss":
            return out_TC
        loss = document_losses(routing.scores_TE, routing.chosen_TK, context).sum()
        weight = balancing.coefficient / max(1, context.num_tokens)
        context.losses[self.layer] = loss.detach() * weight
        return with_loss(out_TC, loss, weight)

    def _needs_no_context(self) -> None:
        balances = self.config.balancing.kind != "none" or self.config.capacity_factor is not None
        if balances and self.training:
            raise ValueError(
                f"layer {self.layer} balances its experts, but was given no documents to count. Pass the decoder a "
                f"TokenContext, or set model.moe.balancing to none and capacity_factor to null."
            )


def grouped_linear(rows_RI: Tensor, weights_EOI: Tensor, counts: Sequence[int]) -> Tensor:
    """[R, O]: every row times the matrix of its expert; rows are sorted by expert, ``counts[e]`` of expert e."""
    # without rows the kernel's backward refuses the strides of its own gradients
    if rows_RI.shape[0] == 0 or not _has_kernel(rows_RI.dtype, *weights_EOI.shape[1:]):
        parts = zip(rows_RI.split(list(counts)), weights_EOI.unbind(), strict=True)
        return torch.cat([F.linear(part, weight) for part, weight in parts])
    ends_E = torch.tensor(list(accumulate(counts)), dtype=torch.int32, device=rows_RI.device)
    out_RO = F.grouped_mm(rows_RI, weights_EOI.transpose(1, 2), offs=ends_E)
    if out_RO.requires_grad:
        out_RO.register_hook(Tensor.contiguous)  # the kernel's backward refuses an expanded gradient
    return out_RO


def _has_kernel(dtype: torch.dtype, *sizes: int) -> bool:
    """Rows of 16-byte steps in float32 or bfloat16, forward and backward."""
    return dtype in (torch.float32, torch.bfloat16) and all(size * dtype.itemsize % 16 == 0 for size in sizes)


def mixtures_of(model: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
