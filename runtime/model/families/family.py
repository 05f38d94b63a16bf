"""What a model family is: its names, and its settings in both directions; and what all families here share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from evermesh.runtime.model.config import BiasBalancing, ModelConfig, MoeConfig
from evermesh.runtime.model.families.rope import read_rope, write_rope
from evermesh.runtime.model.families.settings import Settings

OPTIONS = ("qk_norm", "qkv_bias", "sliding_window", "window_layers", "parallel_block", "moe")
"""Fields of ``ModelConfig`` that not every family has, off by default."""
_OF_ALL_EXPERTS = ("experts", "top_k", "ffn", "balancing")
"""Fields of ``MoeConfig`` that every family has, and the one that counts as an option in one of its forms alone."""
ROUTER_BIAS = "moe.balancing: bias"
"""The option of a model whose routers choose by a bias too."""
ROUTER_BIAS_NAME = "blocks.{layer}.mixture.router.bias"
"""Of these biases in a table of names, although they are no parameters."""
ATTENTION_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "blocks.{layer}.attention_norm.weight": "model.layers.{layer}.input_layernorm.weight",
    "blocks.{layer}.attention.query.weight": "model.layers.{layer}.self_attn.q_proj.weight",
    "blocks.{layer}.attention.key.weight": "model.layers.{layer}.self_attn.k_proj.weight",
    "blocks.{layer}.attention.value.weight": "model.layers.{layer}.self_attn.v_proj.weight",
    "blocks.{layer}.attention.output.weight": "model.layers.{layer}.self_attn.o_proj.weight",
    "blocks.{layer}.feed_forward_norm.weight": "model.layers.{layer}.post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
"""Everything but the feed-forward blocks."""
DENSE_NAMES = ATTENTION_NAMES | {
    "blocks.{layer}.feed_forward.gate.weight": "model.layers.{layer}.mlp.gate_proj.weight",
    "blocks.{layer}.feed_forward.up.weight": "model.layers.{layer}.mlp.up_proj.weight",
    "blocks.{layer}.feed_forward.down.weight": "model.layers.{layer}.mlp.down_proj.weight",
}
QK_NORM_NAMES = {
    "blocks.{layer}.attention.query_norm.weight": "model.layers.{layer}.self_attn.q_norm.weight",
    "blocks.{layer}.attention.key_norm.weight": "model.layers.{layer}.self_attn.k_norm.weight",
}
QKV_BIAS_NAMES = {
    "blocks.{layer}.attention.query.bias": "model.layers.{layer}.self_attn.q_proj.bias",
    "blocks.{layer}.attention.key.bias": "model.layers.{layer}.self_attn.k_proj.bias",
    "blocks.{layer}.attention.value.bias": "model.layers.{layer}.self_attn.v_proj.bias",
}
Read = Callable[[Settings], dict[str, Any]]
Write = Callable[[ModelConfig], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Family:
    """One model family of Hugging Face."""

    model_type: str
    """As in config.json."""
    architecture: str
    """The class of transformers."""
    names: Mapping[str, str]
    """Our parameters and theirs, as ``evermesh.checkpoint.naming`` explains."""
    read: Read = lambda settings: {}
    """Values of ``ModelConfig`` beyond those that all families have; refuses what is not supported."""
    write: Write = lambda model: {}
    """Settings beyond those that all families have."""
    always: frozenset[str] = frozenset()
    """Options that every model of the family has."""
    may: frozenset[str] = field(default=frozenset())
    """Options that a model of it can have."""
    cannot: Callable[[ModelConfig], list[str]] = lambda model: []
    """Why it cannot say what a model is that has these options."""
    default_theta: float = 10_000.0
    """Where config.json gives no rope_theta."""
    default_head_dim: int | None = None
    """Where it gives no head_dim; None: hidden / heads."""

    def misfits(self, model: ModelConfig) -> list[str]:
        """Why its settings cannot say what ``model`` is; empty: they can."""
        used = options_of(model)
        lacking = [f"it always has {name}" for name in sorted(self.always - used)]
        surplus = [f"it has no {name}" for name in sorted(used - self.always - self.may)]
        return lacking + surplus or self.cannot(model)

    def model(self, settings: Settings) -> dict[str, Any]:
        """Values of ``ModelConfig``.

        Raises:
            UnsupportedModel: a setting is missing, not supported or not known.
        """
        settings.expect("hidden_act", "silu")
        for name, off in (
            ("attention_bias", False),
            ("mlp_bias", False),
            ("attention_dropout", 0),
            ("pretraining_tp", 1),
        ):
            settings.expect(name, off)
        settings.expect("architectures", [self.architecture])
        heads, hidden = settings.take("num_attention_heads"), settings.take("hidden_size")
        head_dim = settings.take("head_dim", self.default_head_dim)
        values = {
            "hidden": hidden,
            "layers": settings.take("num_hidden_layers"),
            "heads": heads,
            "kv_heads": settings.take("num_key_value_heads", heads),
            "head_dim": None if head_dim is not None and head_dim * heads == hidden else head_dim,
            "ffn": settings.take("intermediate_size"),
            "vocabulary": settings.take("vocab_size"),
            "norm_eps": settings.take("rms_norm_eps"),
            "tied_embeddings": settings.take("tie_word_embeddings", False),
            "initial_std": settings.take("initializer_range", 0.02),
            "max_positions": settings.take("max_position_embeddings", None),
            **read_rope(settings, self.default_theta),
            **self.read(settings),
        }
        if not settings.is_taken("layer_types"):  # by those whose layers may have windows
            settings.expect("layer_types", ["full_attention"] * values["layers"])
        settings.finish()
        return values

    def settings(self, model: ModelConfig, *, vocabulary: int, max_positions: int, dtype: str) -> dict[str, Any]:
        """The config.json of ``model``, with weights in ``dtype``."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "torch_dtype": dtype,
            "vocab_size": vocabulary,
            "hidden_size": model.hidden,
            "intermediate_size": model.ffn,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_size,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_eps,
            "tie_word_embeddings": model.tied_embeddings,
            "initializer_range": model.initial_std,
            "max_position_embeddings": max_positions,
            "attention_dropout": 0.0,
            **write_rope(model),
            **self.write(model),
        }


def options_of(model: ModelConfig) -> frozenset[str]:
    """The options that a model has: those of ``OPTIONS``, and ``moe.NAME`` where its experts are not the plain ones.

    What changes the training alone is none: a loss that balances experts may be exported to any family.
    """
    used = {name for name in OPTIONS if getattr(model, name) not in (None, False)}
    if model.moe is None:
        return frozenset(used)
    for name, field_info in MoeConfig.model_fields.items():
        if name not in _OF_ALL_EXPERTS and getattr(model.moe, name) != field_info.default:
            used.add(f"moe.{name}")
    if isinstance(model.moe.balancing, BiasBalancing):
        used.add(ROUTER_BIAS)
    return frozenset(used)
