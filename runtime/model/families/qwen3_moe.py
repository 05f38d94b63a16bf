"""Qwen3-MoE: Qwen3 with experts in every layer (Yang et al., arXiv 2505.09388)."""

from typing import Any

from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.families.family import ATTENTION_NAMES, QK_NORM_NAMES, Family
from evermesh.runtime.model.families.settings import Settings


def _experts(settings: Settings) -> dict[str, Any]:
    for name, only in (("use_sliding_window", False), ("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        settings.expect(name, only)
    for unused in ("sliding_window", "max_window_layers", "router_aux_loss_coef"):
        settings.take(unused, None)  # windows are off; the loss of their training is not that of ours
    experts = settings.take("num_local_experts" if settings.has("num_local_experts") else "num_experts")
    return {
        "qk_norm": True,
        "moe": {
            "experts": experts,
            "top_k": settings.take("num_experts_per_tok"),
            "ffn": settings.take("moe_intermediate_size"),
            "normalise_weights": settings.take("norm_topk_prob", False),
        },
    }


def _settings(model: ModelConfig) -> dict[str, Any]:
    moe = model.model_dump()["moe"]
    return {
        "attention_bias": False,
        "moe_intermediate_size": moe["ffn"],
        "num_experts": moe["experts"],
        "num_experts_per_tok": moe["top_k"],
        "norm_topk_prob": moe["normalise_weights"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    ATTENTION_NAMES
    | QK_NORM_NAMES
    | {
        "blocks.{layer}.mixture.router.weight": "model.layers.{layer}.mlp.gate.weight",
        "blocks.{layer}.mixture.experts.gate": "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        "blocks.{layer}.mixture.experts.up": "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
        "blocks.{layer}.mixture.experts.down": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
    },
    read=_experts,
    write=_settings,
    always=frozenset({"qk_norm", "moe"}),
    default_head_dim=128,
)
