"""A decoder: RMSNorm, rotary embedding, grouped-query attention, SwiGLU (LLaMA, Touvron et al., arXiv 2302.13971).

Its options, all in ``ModelConfig``, make it the decoder of other families. The model knows nothing of parallelism: it
takes the tokens of a micro-batch, their positions in their documents, and a function that attends. Shape legend: T
tokens, C hidden size, V vocabulary.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from evermesh.parallelism.experts.documents import TokenContext
from evermesh.runtime.model.blank import Embedding, Linear
from evermesh.runtime.model.blocks import Attend, Block, ParallelBlock
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.rotary import Rotation, rotation
from evermesh.runtime.model.stages import Part


class RunBlock(Protocol):
    """Runs one block, and sees to its activations."""

    def __call__(
        self,
        layer: int,
        block: nn.Module,
        x_TC: Tensor,
        rotation_TD: Rotation,
        attend: Attend,
        context: TokenContext | None,
        /,
    ) -> Tensor:
        """What the block of ``layer`` returns for these inputs, [T, C]."""
        ...


def keep_activations(_: int, block: nn.Module, *inputs: object) -> Tensor:
    """Runs a block and keeps what its backward pass needs."""
    return block(*inputs)


class Decoder(nn.Module):
    """The model, or some parts of it; names and initial values of its parameters do not depend on which, and before
    ``initialize`` they hold nothing.

    Tied embeddings are one parameter, named after the embedding. Where the head is here and the embedding is not, the
    head's weight is a copy of it, which somebody else keeps equal.
    """

    def __init__(self, config: ModelConfig, vocabulary: int, parts: Sequence[Part] = ()) -> None:
        super().__init__()
        self.config, self.vocabulary, self.parts = config, vocabulary, tuple(parts) or (Part(range(config.layers)),)
        block = ParallelBlock if config.parallel_block else Block
        has_embedding, has_head = any(part.is_first for part in self.parts), any(part.is_last for part in self.parts)
        if has_embedding:
            self.embedding = Embedding(vocabulary, config.hidden)
        layers = sorted(layer for part in self.parts for layer in part.layers)
        self.blocks = nn.ModuleDict({str(layer): block(config, layer) for layer in layers})
        if has_head:
            self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
            self.head = Linear(config.hidden, vocabulary, bias=False)
            if config.tied_embeddings and has_embedding:
                self.head.weight = self.embedding.weight
        self.copies_embedding = config.tied_embeddings and has_head and not has_embedding

    def forward(
        self,
        tokens_T: Tensor,
        positions_T: Tensor,
        attend: Attend,
        *,
        run_block: RunBlock = keep_activations,
        context: TokenContext | None = None,
        part: Part | None = None,
        x_TC: Tensor | None = None,
    ) -> Tensor:
        """Logits [T, V]; of a part without head the activations [T, C] behind its last layer.

        Args:
            tokens_T: token ids of a micro-batch, documents one after the other.
            positions_T: position of every token in its own document.
            attend: attention that keeps the documents apart.
            run_block: runs every block. One that computes it again in the backward pass communicates again, if there is a
                ring in the micro-batch; so all members choose alike.
            context: the documents of the tokens, for layers with experts: who is padding, what is balanced.
            part: which part to run; None: the only one.
            x_TC: activations of the part before it; None: it has the embedding.
        """
        part = part or self.parts[0]
        if x_TC is None:
            x_TC = self.embedding(tokens_T)
        rotation_TD = rotation(self.config, positions_T, x_TC.dtype)
        for layer in part.layers:
            x_TC = run_block(layer, self.blocks[str(layer)], x_TC, rotation_TD, attend, context)
        return self.head(self.norm(x_TC)) if part.is_last else x_TC

    def initialize(self, seed: int) -> None:
        """Set all weights from ``seed``: normal, residual outputs scaled by 1/sqrt(2 x layers), norms one, biases zero.

        Every parameter has its own random stream, named after it, so the values depend on nothing else.
        """
        std = self.config.initial_std
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                nn.init.constant_(parameter, 0.0 if name.endswith(".bias") else 1.0)
                continue
            residual = name.endswith(("attention.output.weight", ".down.weight", "experts.down"))
            scale = std / (2 * self.config.layers) ** 0.5 if residual else std
            values = torch.empty(parameter.shape, dtype=torch.float64).normal_(
                0.0, scale, generator=_stream(seed, self._stream_name(name))
            )
            with torch.no_grad():
                parameter.copy_(values)

    def _stream_name(self, name: str) -> str:
        return "embedding.weight" if name == "head.weight" and self.copies_embedding else name


def _stream(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
