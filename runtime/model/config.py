"""The sizes and options of a model; imports no torch."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from evermesh.parallelism.cost import ExpertShape, ModelShape
from evermesh.runtime.errors import VocabularyTooSmall


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LinearRope(_Frozen):
    """Positions divided by ``factor`` (Chen et al., arXiv 2306.15595)."""

    kind: Literal["linear"] = "linear"
    factor: PositiveFloat
    """How many times longer the context becomes."""


class Llama3Rope(_Frozen):
    """Slow rotations divided by ``factor``, fast ones kept, a ramp between: as in checkpoints of Llama 3.1 and later."""

    kind: Literal["llama3"] = "llama3"
    factor: PositiveFloat
    """What slow rotations are divided by."""
    low_freq_factor: PositiveFloat = 1.0
    """Rotations within ``original_positions`` below which a frequency is divided."""
    high_freq_factor: PositiveFloat = 4.0
    """Rotations within ``original_positions`` above which a frequency is kept."""
    original_positions: PositiveInt = 8192
    """Context of the training before the extension, tokens."""

    @model_validator(mode="after")
    def _ramp_ascends(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor {self.high_freq_factor} is not above low_freq_factor {self.low_freq_factor}"
            )
        return self


class YarnRope(_Frozen):
    """Frequencies between interpolated and kept, and warmer attention (Peng et al., YaRN, arXiv 2309.00071)."""

    kind: Literal["yarn"] = "yarn"
    factor: PositiveFloat
    """How many times longer the context becomes."""
    original_positions: PositiveInt
    """Context of the training before the extension, tokens."""
    beta_fast: PositiveFloat = 32.0
    """Rotations within ``original_positions`` above which a frequency is kept."""
    beta_slow: PositiveFloat = 1.0
    """Rotations within ``original_positions`` below which a frequency is divided."""
    attention_factor: PositiveFloat | None = None
    """What rotated queries and keys are multiplied by; null: 0.1 ln(factor) + 1."""
    truncate: bool = True
    """Whether the ends of the ramp are rounded outwards to whole dims."""


RopeScaling = Annotated[LinearRope | Llama3Rope | YarnRope, Field(discriminator="kind")]


class NoBalancing(_Frozen):
    """The router learns from the loss of the tokens alone."""

    kind: Literal["none"] = "none"


class BiasBalancing(_Frozen):
    """A bias on every expert's score, used for the choice only, moves against its load once per step.

    Source: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2); Wang et al., arXiv 2408.15664.
    """

    kind: Literal["bias"] = "bias"
    rate: PositiveFloat = 1e-3
    """What a step adds to the bias of an expert with less than the mean load, and takes from one with more."""


class DocumentLossBalancing(_Frozen):
    """A loss for every document whose tokens crowd on few experts; a document counts by its tokens.

    Source: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2, equations 17 to 20).
    """

    kind: Literal["document_loss"] = "document_loss"
    coefficient: PositiveFloat = 1e-3
    """Times the loss; that of a document with perfect balance is one."""


class MoeConfig(_Frozen):
    """A mixture of experts in place of the feed-forward block of some layers.

    Which tokens an expert sees depends on their documents alone, never on how documents are packed into micro-batches:
    without ``capacity_factor`` no token is dropped, with it every document has slots of its own.
    """

    experts: PositiveInt
    """Experts of a layer that the router chooses from."""
    top_k: PositiveInt = 2
    """Experts that a token passes through."""
    ffn: PositiveInt
    """Width of the SwiGLU block of one expert."""
    shared_ffn: NonNegativeInt = 0
    """Width of the expert that every token passes through; 0: there is none."""
    shared_gate: bool = False
    """Weight the shared expert by a sigmoid of a projection of the token, as Qwen2-MoE does."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores: over all experts together, or each by itself."""
    groups: PositiveInt = 1
    """Groups of consecutive experts; a token chooses within the best of them (DeepSeek-V3)."""
    top_groups: PositiveInt = 1
    """Groups that a token chooses within; their score is the sum of their two best experts."""
    normalise_weights: bool = True
    """Divide the scores of a token's experts by their sum."""
    scale: PositiveFloat = 1.0
    """Times the weights."""
    first_dense_layers: NonNegativeInt = 0
    """Layers at the bottom that keep a dense block."""
    period: PositiveInt = 1
    """Above these, every ``period``-th layer has experts."""
    balancing: Annotated[NoBalancing | BiasBalancing | DocumentLossBalancing, Field(discriminator="kind")] = (
        NoBalancing()
    )
    capacity_factor: PositiveFloat | None = None
    """Slots of an expert for each document, over what an even choice of its tokens would fill; null: none is dropped.

    Of the tokens of a document that choose a full expert, a random selection passes it, keyed by seed, step, document,
    position and layer (random token selection, DeepSpeed-MoE)."""

    @model_validator(mode="after")
    def _choices_exist(self) -> Self:
        if self.experts % self.groups:
            raise ValueError(f"experts {self.experts} is not a multiple of groups {self.groups}")
        if self.top_groups > self.groups:
            raise ValueError(f"top_groups {self.top_groups} is more than groups {self.groups}")
        if self.top_k > self.experts // self.groups * self.top_groups:
            choice = self.experts // self.groups * self.top_groups
            raise ValueError(f"top_k {self.top_k} is more than the {choice} experts that a token chooses from")
        if self.shared_gate and not self.shared_ffn:
            raise ValueError("shared_gate needs a shared expert; set shared_ffn")
        return self


class ModelConfig(_Frozen):
    """Sizes and options of a decoder; the defaults are those of LLaMA."""

    hidden: PositiveInt = 128
    """Width of what passes from layer to layer."""
    layers: PositiveInt = 4
    """Transformer blocks."""
    heads: PositiveInt = 4
    """Query heads of attention."""
    kv_heads: PositiveInt = 2
    """Key and value heads; every one serves heads / kv_heads query heads (grouped-query attention)."""
    head_dim: PositiveInt | None = None
    """Size of a head; null: hidden / heads."""
    ffn: PositiveInt = 352
    """Width of the SwiGLU feed-forward block."""
    vocabulary: PositiveInt | None = None
    """Rows of embedding and head, at least the entries of the tokenizer; null: exactly those."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the frequencies of rotary positions."""
    rope_scaling: RopeScaling | None = None
    """How rotary positions are stretched for a longer context; null: not."""
    max_positions: PositiveInt | None = None
    """Longest context that the weights are said to be good for, tokens: goes into an export, changes no value."""
    norm_eps: PositiveFloat = 1e-5
    """What RMSNorm adds to the mean square before its root."""
    qk_norm: bool = False
    """RMSNorm of every head's queries and keys before their rotation (Qwen3)."""
    qkv_bias: bool = False
    """A bias on the query, key and value projections (Qwen2)."""
    tied_embeddings: bool = False
    """One matrix is embedding and head."""
    sliding_window: PositiveInt | None = None
    """Tokens that a token attends to, itself included; null: all before it in its document."""
    window_layers: tuple[NonNegativeInt, ...] | None = None
    """Layers with the sliding window, ascending from 0; null: all of them."""
    parallel_block: bool = False
    """y = x + attention(norm x) + feed_forward(norm x), one norm per layer (Chowdhery et al., PaLM, arXiv 2204.02311,
    section 2). Another model than the default, not a faster form of it."""
    initial_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    moe: MoeConfig | None = None
    """Layers with a mixture of experts; null: all layers are dense."""

    def has_experts(self, layer: int) -> bool:
        """Whether ``layer`` (from 0) has a mixture of experts."""
        moe = self.moe
        if moe is None or layer < moe.first_dense_layers:
            return False
        return (layer - moe.first_dense_layers + 1) % moe.period == 0

    def active_ffn(self, layer: int) -> int:
        """Width of what a token passes through in ``layer`` behind its attention, over all its experts."""
        moe = self.moe
        return self.ffn if moe is None or not self.has_experts(layer) else moe.top_k * moe.ffn + moe.shared_ffn

    @model_validator(mode="after")
    def _some_layer_has_experts(self) -> Self:
        if self.moe is not None and not any(map(self.has_experts, range(self.layers))):
            first = self.moe.first_dense_layers + self.moe.period
            raise ValueError(
                f"no layer has experts: the first would be layer {first} of {self.layers}. Lower moe.first_dense_layers "
                f"or moe.period, or leave out moe"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.head_dim is None and self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if self.head_size % 2:
            size = "hidden / heads" if self.head_dim is None else "head_dim"
            raise ValueError(f"{size} = {self.head_size} is odd; rotary embedding needs pairs")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        return self

    @model_validator(mode="after")
    def _window_layers_exist(self) -> Self:
        layers = self.window_layers
        if layers is None:
            return self
        if self.sliding_window is None:
            raise ValueError(f"window_layers names {len(layers)} layers, but sliding_window is not set")
        if list(layers) != sorted(set(layers)) or (layers and layers[-1] >= self.layers):
            raise ValueError(f"window_layers {list(layers)} is not an ascending list of layers 0 to {self.layers - 1}")
        return self

    @property
    def head_size(self) -> int:
        """Size of a head, whether given or not."""
        return self.head_dim or self.hidden // self.heads

    def window_of(self, layer: int) -> int | None:
        """The sliding window of a layer, tokens; None: the layer attends to all."""
        return self.sliding_window if self.window_layers is None or layer in self.window_layers else None

    def rows(self, entries: int) -> int:
        """Rows of embedding and head for a tokenizer of so many entries.

        Raises:
            VocabularyTooSmall: ``vocabulary`` is less than that.
        """
        if self.vocabulary is not None and self.vocabulary < entries:
            raise VocabularyTooSmall(
                f"the tokenizer of the data has {entries:,} entries, but the model only {self.vocabulary:,} rows "
                f"(train.model.vocabulary). Prepare the data with the tokenizer that belongs to the weights"
                f", or set it to at least {entries:,} for a model that starts anew."
            )
        return self.vocabulary or entries

    def shape(self, vocabulary: int) -> ModelShape:
        """The sizes that decide the cost, for a tokenizer of ``vocabulary`` entries."""
        return ModelShape(
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_size,
            ffn=self.ffn,
            vocabulary=self.vocabulary or vocabulary,
            experts=self._expert_shape(),
            tied_embeddings=self.tied_embeddings,
        )

    def _expert_shape(self) -> ExpertShape | None:
        if self.moe is None:
            return None
        active_ffn = self.moe.top_k * self.moe.ffn + self.moe.shared_ffn
        layers = sum(map(self.has_experts, range(self.layers)))
        if not layers:  # the period is longer than the model
            return None
        return ExpertShape(
            layers=layers,
            experts=self.moe.experts,
            active_ffn=active_ffn,
            top_k=self.moe.top_k,
            shared_ffn=self.moe.shared_ffn,
            first_dense_layers=self.moe.first_dense_layers,
            period=self.moe.period,
        )
