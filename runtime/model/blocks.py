"""The layers of a decoder: attention, feed-forward, and the blocks made of them.

Shape legend: T tokens, C hidden size, H query heads, K key/value heads, D head size.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from evermesh.parallelism.experts.documents import TokenContext
from evermesh.runtime.model.blank import Linear
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.experts import MixtureOfExperts
from evermesh.runtime.model.rotary import Rotation, rotate


class Attend(Protocol):
    """Attention that keeps the documents of a micro-batch apart."""

    def __call__(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, /, *, window: int | None = None) -> Tensor:
        """[T, H, D]; causal within each document, each token sees the last ``window`` (None: all) up to itself."""
        ...


class Half(Protocol):
    """Runs one half of a block: ``function`` of its input [T, C], of how to attend (None: it does not), and of ``others``."""

    def __call__(
        self, function: Callable[..., Tensor], x_TC: Tensor, attend: Attend | None, /, *others: object
    ) -> Tensor:
        """What the function returns, [T, C]."""
        ...


def _at_once(function: Callable[..., Tensor], x_TC: Tensor, attend: Attend | None, /, *others: object) -> Tensor:
    return function(x_TC, attend, *others)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_size, config.window_of(layer)
        self.query = Linear(config.hidden, config.heads * self.head_dim, bias=config.qkv_bias)
        self.key = Linear(config.hidden, config.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.value = Linear(config.hidden, config.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.query_norm, self.key_norm = (
            nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        self.output = Linear(config.heads * self.head_dim, config.hidden, bias=False)

    def forward(self, x_TC: Tensor, rotation_TD: Rotation, attend: Attend) -> Tensor:
        out_THD = attend(*self.project(x_TC, rotation_TD), window=self.window)
        return self.output(out_THD.flatten(1))

    def project(self, x_TC: Tensor, rotation_TD: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [T, H, D] and keys [T, K, D], and values [T, K, D]."""
        q_THD, k_TKD, v_TKD = (
            project(x_TC).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value)
        )
        q_THD, k_TKD = self.query_norm(q_THD), self.key_norm(k_TKD)
        return rotate(q_THD, rotation_TD), rotate(k_TKD, rotation_TD), v_TKD


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate = Linear(hidden, ffn, bias=False)
        self.up = Linear(hidden, ffn, bias=False)
        self.down = Linear(ffn, hidden, bias=False)

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_TC)) * self.up(x_TC))


class Block(nn.Module):
    """Attention and feed-forward (or a mixture of experts), each behind a norm and a residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.mixture = _mixture(config, layer)
        self.feed_forward = FeedForward(config.hidden, config.ffn) if self.mixture is None else None

    def forward(
        self,
        x_TC: Tensor,
        rotation_TD: Rotation,
        attend: Attend,
        context: TokenContext | None,
        half: Half = _at_once,
    ) -> Tensor:
        """[T, C] to [T, C]; ``half`` runs attention, and what follows it."""
        x_TC = x_TC + half(self._attended, x_TC, attend, rotation_TD)
        return x_TC + half(self._fed, x_TC, None, context)

    def _attended(self, x_TC: Tensor, attend: Attend, rotation_TD: Rotation) -> Tensor:
        return self.attention(self.attention_norm(x_TC), rotation_TD, attend)

    def _fed(self, x_TC: Tensor, _: None, context: TokenContext | None) -> Tensor:
        return _feed(self, self.feed_forward_norm(x_TC), context)


class ParallelBlock(nn.Module):
    """Attention and feed-forward side by side, behind one norm (Chowdhery et al., PaLM, arXiv 2204.02311, section 2)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.mixture = _mixture(config, layer)
        self.feed_forward = FeedForward(config.hidden, config.ffn) if self.mixture is None else None

    def forward(
        self,
        x_TC: Tensor,
        rotation_TD: Rotation,
        attend: Attend,
        context: TokenContext | None,
        half: Half | None = None,
    ) -> Tensor:
        """[T, C] to [T, C]; with a ``half`` that runs attention, and what is beside it, each computes the norm itself."""
        if half is not None:
            attended_TC = half(self._attended, x_TC, attend, rotation_TD)
            return x_TC + attended_TC + half(self._fed, x_TC, None, context)
        normed_TC = self.input_norm(x_TC)
        return x_TC + self.attention(normed_TC, rotation_TD, attend) + _feed(self, normed_TC, context)

    def _attended(self, x_TC: Tensor, attend: Attend, rotation_TD: Rotation) -> Tensor:
        return self.attention(self.input_norm(x_TC), rotation_TD, attend)

    def _fed(self, x_TC: Tensor, _: None, context: TokenContext | None) -> Tensor:
        return _feed(self, self.input_norm(x_TC), context)


def _mixture(config: ModelConfig, layer: int) -> MixtureOfExperts | None:
    """The mixture of experts of a layer; None: the layer is dense."""
    moe = config.moe
    if moe is None or not config.has_experts(layer):
        return None
    shared = FeedForward(config.hidden, moe.shared_ffn) if moe.shared_ffn else None
    return MixtureOfExperts(config.hidden, moe, layer, shared)


def _feed(block: Block | ParallelBlock, x_TC: Tensor, context: TokenContext | None) -> Tensor:
    if block.mixture is not None:
        return block.mixture(x_TC, context)
    assert block.feed_forward is not None
    return block.feed_forward(x_TC)
