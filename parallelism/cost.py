"""What a micro-batch costs: compute linear in tokens and quadratic in documents, ring traffic, fixed costs.

Formulas: ByteScale (arXiv 2502.21231, section 5) for linear + quadratic compute; the ring term is the KV traffic of zig-zag
ring attention, hidden behind the attention of the same step as far as it fits.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

FlopConvention = Literal["causal", "full"]


class ExpertShape(BaseModel):
    """The sizes of the layers of a decoder that have a mixture of experts in place of the feed-forward block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: PositiveInt
    """How many layers have one."""
    experts: PositiveInt
    """Experts that the router of a layer chooses from."""
    active_ffn: PositiveInt
    """Width that one token passes through: of its chosen experts together, and of the shared one."""


class ModelShape(BaseModel):
    """The sizes of a decoder that decide its cost."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    hidden: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt
    ffn: PositiveInt
    vocabulary: PositiveInt
    experts: ExpertShape | None = None
    """None: every layer has a dense feed-forward block."""

    def linear_flops_per_token(self) -> float:
        """Forward FLOPs of all matrix products that do not depend on the sequence length, logits included.

        Of a mixture of experts only what a token passes through counts, and its router.
        """
        attention = self.layers * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        feed_forward = self.layers * 3 * self.ffn
        if self.experts is not None:
            of_experts = 3 * self.experts.active_ffn + self.experts.experts
            feed_forward = (self.layers - self.experts.layers) * 3 * self.ffn + self.experts.layers * of_experts
        return 2.0 * self.hidden * (attention + feed_forward + self.vocabulary)

    def attention_flops_per_pair(self) -> float:
        """Forward FLOPs of one (query, key) pair over all layers: QK^T and PV."""
        return 4.0 * self.layers * self.heads * self.head_dim

    def training_flops(self, lengths: tuple[int, ...], convention: FlopConvention = "causal") -> float:
        """FLOPs of one training step: forward, 2x backward for matrix products, 2.5x for flash attention.

        ``causal`` counts the s(s+1)/2 visible pairs of a document, ``full`` all s^2 (the Megatron-LM convention).
        """
        tokens = sum(lengths)
        pairs = sum(s * (s + 1) / 2 if convention == "causal" else float(s * s) for s in lengths)
        return 3.0 * self.linear_flops_per_token() * tokens + 3.5 * self.attention_flops_per_pair() * pairs


class CostModel(BaseModel):
    """Seconds that one HDP rank needs, forward and backward together."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    token_s: PositiveFloat
    """Seconds per token: matrix products, norms, loss."""
    pair_s: NonNegativeFloat
    """Seconds per visible (query, key) pair of attention."""
    micro_batch_s: NonNegativeFloat = 0.0
    """Fixed seconds per micro-batch."""
    piece_s: NonNegativeFloat = 0.0
    """Fixed seconds per piece in a micro-batch (kernel launches of one document)."""
    ring_step_s: NonNegativeFloat = 0.0
    """Fixed seconds per step of a ring."""
    ring_token_s: NonNegativeFloat = 0.0
    """Seconds to pass the keys, values and their gradients of one token to the neighbour, all layers."""
    version: NonNegativeInt = 0
    """Raised with every change of a coefficient; every plan records the version it was made with."""

    @classmethod
    def from_model(
        cls,
        shape: ModelShape,
        *,
        flops_per_s: float,
        attention_flops_per_s: float,
        bytes_per_s: float,
        bytes_per_element: int = 2,
        recompute: float = 0.0,
        recompute_products: float | None = None,
    ) -> Self:
        """Coefficients from the sizes of a model and sustained rates of one device (FLOP/s, link bytes/s).

        Flash attention's backward costs 2.5 forwards. What is computed again adds its share of one more forward:
        ``recompute`` of all attention, ``recompute_products`` of everything else (None: as much).
        """
        products = recompute if recompute_products is None else recompute_products
        kv_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * bytes_per_element
        return cls(
            token_s=(3.0 + products) * shape.linear_flops_per_token() / flops_per_s,
            pair_s=(3.5 + recompute) * shape.attention_flops_per_pair() / attention_flops_per_s,
            # keys and values travel forward and again backward, their gradients travel once
            ring_token_s=(3.0 + recompute) * kv_bytes / bytes_per_s,
        )

    def whole_s(self, length: int) -> float:
        """Seconds for a document on one rank, without the fixed cost of its micro-batch."""
        return self.piece_s + self.token_s * length + self.pair_s * (length * (length + 1) / 2)

    def ring_s(self, length: int, ring: int) -> float:
        """Seconds of every member for a document over ``ring`` ranks, without the fixed cost of the micro-batch."""
        if ring == 1:
            return self.whole_s(length)
        attention = self.pair_s * (length * (length + 1) / 2) / ring
        traffic = (ring - 1) / ring * length * self.ring_token_s
        return self.piece_s + self.token_s * length / ring + max(attention, traffic) + (ring - 1) * self.ring_step_s
