"""dots.llm1: Qwen3's attention with experts as DeepSeek-V3 routes them (Huo et al., arXiv 2506.05767).

Experts are scored one by one and chosen by score and bias within the best groups; some layers at the bottom are dense.
"""

from typing import Any

from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.families.experts import QWEN_EXPERT_NAMES
from evermesh.runtime.model.families.family import DENSE_NAMES, QK_NORM_NAMES, ROUTER_BIAS, ROUTER_BIAS_NAME, Family
from evermesh.runtime.model.families.settings import Settings
from evermesh.runtime.model.families.windows import read_layer_types, write_layer_types


def _read(settings: Settings) -> dict[str, Any]:
    settings.expect("scoring_func", "sigmoid", "noaux_tc")
    settings.expect("topk_method", "noaux_tc")
    settings.expect("moe_layer_freq", 1)
    if not settings.has("sliding_window"):
        settings.refuse("sliding_window", "it has to be there: a missing one means 4096 to transformers")
    ffn = settings.take("moe_intermediate_size")
    return {
        "qk_norm": True,
        "moe": {
            "experts": settings.take("n_routed_experts"),
            "top_k": settings.take("num_experts_per_tok"),
            "ffn": ffn,
            "shared_ffn": ffn * settings.take("n_shared_experts"),
            "router": "sigmoid",
            "groups": settings.take("n_group", 1),
            "top_groups": settings.take("topk_group", 1),
            "normalise_weights": settings.take("norm_topk_prob", False),
            "scale": settings.take("routed_scaling_factor", 1.0),
            "first_dense_layers": settings.take("first_k_dense_replace", 0),
        },
        **read_layer_types(settings, settings.take("sliding_window", None), default_first=62),
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    assert moe is not None, "the family is one of models with experts"
    return {
        "attention_bias": False,
        "n_routed_experts": moe.experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.ffn,
        "n_shared_experts": moe.shared_ffn // moe.ffn,
        "n_group": moe.groups,
        "topk_group": moe.top_groups,
        "norm_topk_prob": moe.normalise_weights,
        "routed_scaling_factor": moe.scale,
        "first_k_dense_replace": moe.first_dense_layers,
        **write_layer_types(model),
    }


def _cannot(model: ModelConfig) -> list[str]:
    moe = model.moe
    if moe is None:
        return []
    reasons = []
    if moe.shared_ffn % moe.ffn:
        reasons.append(f"its moe.shared_ffn is a multiple of moe.ffn {moe.ffn}, not {moe.shared_ffn}")
    if moe.experts // moe.groups < 2:
        reasons.append(f"its groups have at least two experts, not {moe.experts // moe.groups} (moe.groups)")
    return reasons


DOTS1 = Family(
    "dots1",
    "Dots1ForCausalLM",
    DENSE_NAMES
    | QK_NORM_NAMES
    | QWEN_EXPERT_NAMES
    | {
        "blocks.{layer}.mixture.shared.gate.weight": "model.layers.{layer}.mlp.shared_experts.gate_proj.weight",
        "blocks.{layer}.mixture.shared.up.weight": "model.layers.{layer}.mlp.shared_experts.up_proj.weight",
        "blocks.{layer}.mixture.shared.down.weight": "model.layers.{layer}.mlp.shared_experts.down_proj.weight",
        ROUTER_BIAS_NAME: "model.layers.{layer}.mlp.gate.e_score_correction_bias",
    },
    read=_read,
    write=_write,
    always=frozenset({"qk_norm", "moe", "moe.router", "moe.shared_ffn"}),
    may=frozenset(
        {
            "moe.groups",
            "moe.top_groups",
            "moe.normalise_weights",
            "moe.scale",
            "moe.first_dense_layers",
            ROUTER_BIAS,
            "sliding_window",
            "window_layers",
        }
    ),
    cannot=_cannot,
)
