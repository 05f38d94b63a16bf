"""A decoder: RMSNorm, rotary embedding, grouped-query attention, SwiGLU (LLaMA, Touvron et al., arXiv 2302.13971).

Its options, all in ``ModelConfig``, make it the decoder of other families. The model knows nothing of parallelism: it
takes the tokens of a micro-batch, their positions in their documents, and a function that attends. Shape legend: T
tokens, C hidden size, H query heads, K key/value heads, D head size, V vocabulary.
"""

import hashlib
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from evermesh.runtime.config import ModelConfig
from evermesh.runtime.model.rotary import Rotation, rotate, rotation


class Attend(Protocol):
    """Attention that keeps the documents of a micro-batch apart."""

    def __call__(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, /, *, window: int | None = None) -> Tensor:
        """[T, H, D]; causal within each document, each token sees the last ``window`` (None: all) up to itself."""
        ...


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_size, config.window_of(layer)
        self.query = nn.Linear(config.hidden, config.heads * self.head_dim, bias=config.qkv_bias)
        self.key = nn.Linear(config.hidden, config.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.value = nn.Linear(config.hidden, config.kv_heads * self.head_dim, bias=config.qkv_bias)
        self.query_norm, self.key_norm = (
            nn.RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )
        self.output = nn.Linear(config.heads * self.head_dim, config.hidden, bias=False)

    def forward(self, x_TC: Tensor, rotation_TD: Rotation, attend: Attend) -> Tensor:
        q_THD, k_TKD, v_TKD = (
            project(x_TC).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value)
        )
        q_THD, k_TKD = self.query_norm(q_THD), self.key_norm(k_TKD)
        out_THD = attend(rotate(q_THD, rotation_TD), rotate(k_TKD, rotation_TD), v_TKD, window=self.window)
        return self.output(out_THD.flatten(1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x_TC: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_TC)) * self.up(x_TC))


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and a residual."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_TC: Tensor, rotation_TD: Rotation, attend: Attend) -> Tensor:
        x_TC = x_TC + self.attention(self.attention_norm(x_TC), rotation_TD, attend)
        return x_TC + self.feed_forward(self.feed_forward_norm(x_TC))


class ParallelBlock(nn.Module):
    """Attention and feed-forward side by side, behind one norm (Chowdhery et al., PaLM, arXiv 2204.02311, section 2)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.attention = Attention(config, layer)
        self.feed_forward = FeedForward(config)

    def forward(self, x_TC: Tensor, rotation_TD: Rotation, attend: Attend) -> Tensor:
        normed_TC = self.input_norm(x_TC)
        return x_TC + self.attention(normed_TC, rotation_TD, attend) + self.feed_forward(normed_TC)


class Decoder(nn.Module):
    """The whole model; ``forward`` returns logits."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.embedding = nn.Embedding(vocabulary, config.hidden)
        block = ParallelBlock if config.parallel_block else Block
        self.blocks = nn.ModuleList(block(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden, vocabulary, bias=False)
        if config.tied_embeddings:
            self.head.weight = self.embedding.weight  # one parameter, named after the embedding

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, *, recompute: bool = False) -> Tensor:
        """Logits [T, V].

        Args:
            tokens_T: token ids of a micro-batch, documents one after the other.
            positions_T: position of every token in its own document.
            attend: attention that keeps the documents apart.
            recompute: keep only the input of every block and compute it again in the backward pass. With a ring in the
                micro-batch the recomputation communicates, so all members choose alike.
        """
        x_TC = self.embedding(tokens_T)
        rotation_TD = rotation(self.config, positions_T, x_TC.dtype)
        for block in self.blocks:
            if recompute:
                x_TC = checkpoint(block, x_TC, rotation_TD, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TC = block(x_TC, rotation_TD, attend)
        return self.head(self.norm(x_TC))

    def initialize(self, seed: int) -> None:
        """Set all weights from ``seed``: normal, residual outputs scaled by 1/sqrt(2 x layers), norms one, biases zero.

        Every parameter has its own random stream, named after it, so the values depend on nothing else.
        """
        std = self.config.initial_std
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.constant_(parameter, 0.0 if name.endswith(".bias") else 1.0)
                continue
            residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            scale = std / (2 * self.config.layers) ** 0.5 if residual else std
            values = torch.empty(parameter.shape, dtype=torch.float64).normal_(
                0.0, scale, generator=_stream(seed, name)
            )
            with torch.no_grad():
                parameter.copy_(values)


def _stream(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
