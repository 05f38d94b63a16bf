"""What a micro-batch costs: compute linear in tokens and quadratic in documents, ring traffic, offloading, fixed costs.

Formulas: ByteScale (arXiv 2502.21231, section 5) for linear + quadratic compute; the ring term is the KV traffic of zig-zag
ring attention, hidden behind the attention of the same step as far as it fits. Copies to host memory hide behind the
forward pass of their micro-batch, and copies back behind its backward pass (the same paper, equation 3).
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

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
    top_k: PositiveInt = 1
    """Experts that one token chooses."""
    shared_ffn: NonNegativeInt = 0
    """Of ``active_ffn``: the width of the expert that every token passes through."""
    first_dense_layers: NonNegativeInt = 0
    """Layers at the bottom that have none."""
    period: PositiveInt = 1
    """Above these, every ``period``-th layer has one."""

    @property
    def ffn(self) -> int:
        """Width of one expert."""
        return (self.active_ffn - self.shared_ffn) // self.top_k


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
    gated: bool = True
    """Whether feed-forward blocks have a gate, so three matrices (SwiGLU), or two (GPT)."""
    tied_embeddings: bool = False
    """Whether one matrix is embedding and head."""

    @property
    def ffn_matrices(self) -> int:
        """Of a feed-forward block."""
        return 3 if self.gated else 2

    def has_experts(self, layer: int) -> bool:
        """Whether ``layer`` (from 0) has a mixture of experts."""
        experts = self.experts
        if experts is None or layer < experts.first_dense_layers:
            return False
        return (layer - experts.first_dense_layers + 1) % experts.period == 0

    def attention_elements(self) -> int:
        """Elements of the four matrices of one layer's attention."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    def active_elements(self, layer: int) -> int:
        """Elements of the matrices that one token passes through in ``layer``; half its forward FLOPs outside attention."""
        if not self.has_experts(layer):
            return self.attention_elements() + self.ffn_matrices * self.hidden * self.ffn
        assert self.experts is not None
        through = self.ffn_matrices * self.experts.active_ffn + self.experts.experts
        return self.attention_elements() + self.hidden * through

    def linear_flops_per_token(self) -> float:
        """Forward FLOPs of all matrix products that do not depend on the sequence length, logits included.

        Of a mixture of experts only what a token passes through counts, and its router.
        """
        matrices = self.ffn_matrices
        attention = self.layers * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        feed_forward = self.layers * matrices * self.ffn
        if self.experts is not None:
            of_experts = matrices * self.experts.active_ffn + self.experts.experts
            feed_forward = (self.layers - self.experts.layers) * matrices * self.ffn + self.experts.layers * of_experts
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

    def model_flops(self, lengths: tuple[int, ...]) -> float:
        """FLOPs that a training step has to do, for model FLOP utilisation (PaLM, arXiv 2204.02311): three times those of the
        forward pass, of attention only the pairs that a causal mask leaves; nothing that is computed twice, no padding."""
        pairs = sum(s * (s + 1) / 2 for s in lengths)
        return 3.0 * (self.linear_flops_per_token() * sum(lengths) + self.attention_flops_per_pair() * pairs)


class Sharing(NamedTuple):
    """How the members of a ring share the attention of a sequence."""

    ring: int = 1
    """Members."""
    heads: int = 1
    """Of them, so many neighbours inside one node divide the heads among them (Ulysses, arXiv 2309.14509), and only as many
    groups as remain pass keys and values around: 1 is ring attention, ``ring`` is Ulysses, between them is the
    two-dimensional scheme (USP, arXiv 2405.07719)."""
    gathers: bool = False
    """Keys and values are gathered at once instead of passed around: fewer steps, but nothing hides them."""
    crosses_nodes: bool = False


class Work(NamedTuple):
    """What a rank computes of one document, or of all documents of a micro-batch."""

    tokens: float
    pairs: float
    """Visible (query, key) pairs, with the padding of tiles."""


class Parts(NamedTuple):
    """What a member of a ring spends on a document, seconds."""

    products: float
    """Everything but attention."""
    attention: float
    passed: float = 0.0
    """Keys and values on their way from the neighbour."""
    exchanged: float = 0.0
    """By heads."""
    steps: float = 0.0
    """Fixed, of all steps together."""
    gathers: bool = False

    @property
    def seconds(self) -> float:
        """All together."""
        products, attention, passed, exchanged, steps, gathers = self
        if gathers:
            return products + attention + passed + exchanged + steps
        return products + max(attention, passed) + exchanged + steps


_PASSES, _ATTENTION_PASSES = 3.0, 3.5
"""Forward and backward together, in forward passes: backward is two of them for matrix products, 2.5 for flash attention."""


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
    tile: PositiveInt = 1
    """Tokens to a multiple of which attention kernels pad queries and keys; short chunks cost as much as a whole tile."""
    expert_token_s: NonNegativeFloat = 0.0
    """Seconds per token to send it to its experts and back, forward and backward, all layers."""
    recompute_token_s: NonNegativeFloat = 0.0
    """Seconds more per token where the blocks of a micro-batch are computed again before the backward pass."""
    recompute_pair_s: NonNegativeFloat = 0.0
    """Seconds more per pair where they are."""
    offload_saves_token_s: NonNegativeFloat = 0.0
    """Of ``recompute_token_s``: what a token saves whose matrix products wait in host memory."""
    host_token_s: NonNegativeFloat = 0.0
    """Seconds to copy to host memory, one way, what blocks that offload always move of a token."""
    host_products_token_s: NonNegativeFloat = 0.0
    """Seconds to copy the products of one token besides, where they wait in host memory."""
    ring_step_s: NonNegativeFloat = 0.0
    """Fixed seconds per step of a ring inside a node."""
    ring_token_s: NonNegativeFloat = 0.0
    """Seconds to pass the keys, values and their gradients of one token to a neighbour in the same node, all layers."""
    network_step_s: NonNegativeFloat | None = None
    """As ``ring_step_s`` for a ring that crosses nodes; None: the same."""
    network_token_s: NonNegativeFloat | None = None
    """As ``ring_token_s`` for a neighbour in another node; None: the same."""
    head_token_s: NonNegativeFloat = 0.0
    """Seconds to exchange one token of a member's share by heads inside a node, there and back, forward and backward."""
    version: NonNegativeInt = 0
    """Raised with every change of a coefficient; every plan records the version it was made with."""

    @model_validator(mode="after")
    def _a_network_is_no_faster_than_a_node(self) -> Self:
        for inside, outside in (("ring_token_s", "network_token_s"), ("ring_step_s", "network_step_s")):
            if (found := getattr(self, outside)) is not None and found < getattr(self, inside):
                raise ValueError(
                    f"{outside} {found} is less than {inside} {getattr(self, inside)}: a ring that crosses nodes also has "
                    f"links inside them. Set {outside} to at least {inside}, or leave it out."
                )
        return self

    @model_validator(mode="after")
    def _offloading_saves_no_more_than_is_repeated(self) -> Self:
        if self.offload_saves_token_s > self.recompute_token_s * (1 + 1e-9):
            raise ValueError(
                f"offload_saves_token_s {self.offload_saves_token_s} is more than recompute_token_s "
                f"{self.recompute_token_s}, of which it is a part: what a token costs to compute again where none of its "
                "products wait in host memory. Set offload_saves_token_s to at most that."
            )
        return self

    @classmethod
    def from_model(
        cls,
        shape: ModelShape,
        *,
        flops_per_s: float,
        attention_flops_per_s: float,
        bytes_per_s: float,
        network_bytes_per_s: float | None = None,
        bytes_per_element: int = 2,
        recompute: float = 0.0,
        recompute_products: float | None = None,
    ) -> Self:
        """Coefficients from the sizes of a model and sustained rates of one HDP rank (FLOP/s, bytes/s of a link).

        Flash attention's backward costs 2.5 forwards. What is computed again adds its share of one more forward:
        ``recompute`` of all attention, ``recompute_products`` of everything else (None: as much).
        """
        products = recompute if recompute_products is None else recompute_products
        token_s = shape.linear_flops_per_token() / flops_per_s
        pair_s = shape.attention_flops_per_pair() / attention_flops_per_s
        kv_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * bytes_per_element
        query_bytes = kv_bytes * shape.heads / shape.kv_heads
        # keys and values travel forward and again backward, their gradients travel once
        trips = 3.0 + recompute
        return cls(
            token_s=_PASSES * token_s,
            pair_s=_ATTENTION_PASSES * pair_s,
            recompute_token_s=products * token_s,
            recompute_pair_s=recompute * pair_s,
            ring_token_s=trips * kv_bytes / bytes_per_s,
            network_token_s=None
            if network_bytes_per_s is None
            else trips * kv_bytes / min(network_bytes_per_s, bytes_per_s),
            # queries and outputs, keys and values: forward, and their gradients backward
            head_token_s=(2.0 + recompute) * (kv_bytes + query_bytes) / bytes_per_s,
        )

    def whole_s(self, length: int, *, recomputed: bool = False) -> float:
        """Seconds for a document on one rank, without the fixed cost of its micro-batch."""
        return self.shared_s(length, Sharing(), recomputed=recomputed)

    def ring_s(self, length: int, ring: int, *, crosses_nodes: bool = False, recomputed: bool = False) -> float:
        """Seconds of every member of plain ring attention, without the fixed cost of the micro-batch."""
        return self.shared_s(length, Sharing(ring, crosses_nodes=crosses_nodes), recomputed=recomputed)

    def shared_s(self, length: int, sharing: Sharing, *, recomputed: bool = False) -> float:
        """Seconds of every member for a document shared like that, without the fixed cost of the micro-batch.

        What is passed around is hidden behind the attention of the same step as far as it fits; what is gathered or
        exchanged by heads is not.
        """
        return self.parts(length, sharing, recomputed=recomputed).seconds

    def parts(self, length: int, sharing: Sharing, *, recomputed: bool = False) -> "Parts":
        """What ``shared_s`` adds up. Of what is recomputed, nothing waits in host memory: ``offload_s`` is the difference."""
        ring, heads, gathers, crosses_nodes = sharing
        token_s = self.token_s + self.expert_token_s + (self.recompute_token_s if recomputed else 0.0)
        pair_s = self.pair_s + (self.recompute_pair_s if recomputed else 0.0)
        groups, padded = ring // heads, self._padded(length, sharing)
        products = self.piece_s + token_s * length / ring
        attention = pair_s * (padded * (padded + 1) / 2) / ring
        if ring == 1:
            return Parts(products, attention)
        exchanged = (heads - 1) / heads * length / ring * self.head_token_s
        network = crosses_nodes and groups > 1
        passed_token_s = self.ring_token_s if not network or self.network_token_s is None else self.network_token_s
        step_s = self.ring_step_s if not network or self.network_step_s is None else self.network_step_s
        passed = (groups - 1) / groups * length / heads * passed_token_s
        steps = (groups - 1) + (heads > 1)
        return Parts(products, attention, passed, exchanged, (min(steps, 2) if gathers else steps) * step_s, gathers)

    def work(self, length: int, sharing: Sharing) -> Work:
        """What every member computes of a document shared like that."""
        padded = self._padded(length, sharing)
        return Work(length / sharing.ring, padded * (padded + 1) / 2 / sharing.ring)

    @staticmethod
    def together(documents: Iterable[Work]) -> Work:
        """What a micro-batch of these documents computes."""
        tokens = pairs = 0.0
        for document in documents:
            tokens += document.tokens
            pairs += document.pairs
        return Work(tokens, pairs)

    def _padded(self, length: int, sharing: Sharing) -> int:
        """Tokens of a document with the padding of tiles."""
        # a member holds two chunks; those that divide heads see the chunks of all of them
        groups = sharing.ring // sharing.heads
        chunks = 1 if groups == 1 else 2 * groups
        return length if self.tile == 1 else -(-length // (chunks * self.tile)) * self.tile * chunks

    @property
    def offloads(self) -> bool:
        """Whether offloading changes any time."""
        return self.offload_saves_token_s + self.host_token_s + self.host_products_token_s > 0

    def passes_s(self, work: Work) -> tuple[float, float]:
        """Forward, and backward with what is computed again before it: seconds behind which copies hide."""
        tokens, pairs = work
        forward = self.token_s / _PASSES * tokens + self.pair_s / _ATTENTION_PASSES * pairs
        again = self.recompute_token_s * tokens + self.recompute_pair_s * pairs
        backward = (_PASSES - 1) / _PASSES * self.token_s * tokens
        return forward, backward + (_ATTENTION_PASSES - 1) / _ATTENTION_PASSES * self.pair_s * pairs + again

    def offload_s(self, work: Work, fraction: float) -> float:
        """Seconds more that a recomputed micro-batch takes if the products of that fraction of its tokens wait on the host.

        They are not computed again; copies out last longer than the forward pass, or copies back longer than the backward
        pass, as far as they do not hide. Below zero where more is saved. Convex in the fraction.
        """
        forward, backward = self.passes_s(work)
        copied = (self.host_token_s + fraction * self.host_products_token_s) * work.tokens
        saved = fraction * self.offload_saves_token_s * work.tokens
        return max(0.0, copied - forward) + max(0.0, copied - (backward - saved)) - saved

    def best_offload(self, work: Work) -> float:
        """The fraction with the least ``offload_s``, of equals the least."""
        forward, backward = self.passes_s(work)
        return best_fraction(
            work.tokens,
            forward,
            backward,
            self.host_token_s,
            self.host_products_token_s,
            self.offload_saves_token_s,
        )


def best_fraction(
    tokens: float, forward_s: float, backward_s: float, host_token_s: float, products_token_s: float, saves_s: float
) -> float:
    """See ``CostModel.best_offload``; a function of numbers, which the planner compiles.

    Until copies out last as long as the forward pass, moving a token saves what it costs to compute it again. Beyond, it
    costs the copy: worth it only where the copy is shorter, and until copies back outlast the backward pass. That is never
    sooner, because backward is at least twice as long as forward.
    """
    if saves_s == 0 or tokens == 0:
        return 0.0
    always_s = host_token_s * tokens
    if saves_s <= products_token_s:
        left_s, each_s = forward_s - always_s, products_token_s * tokens
    else:
        left_s, each_s = backward_s - always_s, (products_token_s + saves_s) * tokens
    return min(1.0, max(0.0, left_s / each_s))
