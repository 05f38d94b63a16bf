"""A LLaMA-style decoder: RMSNorm, rotary embedding, grouped-query attention, SwiGLU (Touvron et al., arXiv 2302.13971).

The model knows nothing of parallelism: it takes the tokens of a micro-batch, their positions in their documents, and a
function that attends. Shape legend: T tokens, C hidden size, H query heads, K key/value heads, D head size, V vocabulary.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from evermesh.runtime.config import ModelConfig

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [T, H, D], k [T, K, D], v [T, K, D]) -> [T, H, D]; causal within each document."""


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.hidden // config.heads
        self.query = nn.Linear(config.hidden, config.heads * self.head_dim, bias=False)
        self.key = nn.Linear(config.hidden, config.kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(config.hidden, config.kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(config.heads * self.head_dim, config.hidden, bias=False)

    def forward(self, x_TC: Tensor, rotation_TD: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q_THD, k_TKD, v_TKD = (
            project(x_TC).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value)
        )
        out_THD = attend(_rotate(q_THD, rotation_TD), _rotate(k_TKD, rotation_TD), v_TKD)
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

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_TC: Tensor, rotation_TD: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x_TC = x_TC + self.attention(self.attention_norm(x_TC), rotation_TD, attend)
        return x_TC + self.feed_forward(self.feed_forward_norm(x_TC))


class Decoder(nn.Module):
    """The whole model; ``forward`` returns logits."""

    def __init__(self, config: ModelConfig, vocabulary: int) -> None:
        super().__init__()
        self.config, self.vocabulary = config, vocabulary
        self.embedding = nn.Embedding(vocabulary, config.hidden)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden, vocabulary, bias=False)

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
        rotation_TD = self._rotation(positions_T, x_TC.dtype)
        for block in self.blocks:
            if recompute:
                x_TC = checkpoint(block, x_TC, rotation_TD, attend, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TC = block(x_TC, rotation_TD, attend)
        return self.head(self.norm(x_TC))

    def initialize(self, seed: int) -> None:
        """Set all weights from ``seed``: normal, residual outputs scaled by 1/sqrt(2 x layers), norms one.

        Every parameter has its own random stream, named after it, so the values depend on nothing else.
        """
        std = self.config.initial_std
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.ones_(parameter)
                continue
            residual = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
            scale = std / (2 * self.config.layers) ** 0.5 if residual else std
            values = torch.empty(parameter.shape, dtype=torch.float64).normal_(
                0.0, scale, generator=_stream(seed, name)
            )
            with torch.no_grad():
                parameter.copy_(values)

    def _rotation(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine [T, 1, D/2] of every position's angles, computed in float64: positions may be large."""
        head_dim = self.config.hidden // self.config.heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions_T.device) / head_dim
        angles = positions_T.to(torch.float64).unsqueeze(-1) * self.config.rope_theta**-exponents
        return angles.cos().to(dtype).unsqueeze(1), angles.sin().to(dtype).unsqueeze(1)


def _rotate(x_THD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding in the half-split convention of LLaMA checkpoints (Su et al., arXiv 2104.09864)."""
    cosine, sine = rotation
    first, second = x_THD.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def _stream(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
