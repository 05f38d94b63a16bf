"""Qwen2-MoE and Qwen1.5-MoE: Qwen2 with experts and one that every token passes through (Yang et al., arXiv 2407.10671)."""

from typing import Any

from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.families.experts import (
    QWEN_EXPERT_NAMES,
    QWEN_OPTIONS,
    read_qwen_experts,
    write_qwen_experts,
)
from evermesh.runtime.model.families.family import DENSE_NAMES, QKV_BIAS_NAMES, Family
from evermesh.runtime.model.families.settings import Settings


def _read(settings: Settings) -> dict[str, Any]:
    shared = {"shared_ffn": settings.take("shared_expert_intermediate_size"), "shared_gate": True}
    return {
        "qkv_bias": settings.take("qkv_bias", True),
        "moe": read_qwen_experts(settings) | shared,
    }


def _write(model: ModelConfig) -> dict[str, Any]:
    assert model.moe is not None, "the family is one of models with experts"
    return {
        "qkv_bias": model.qkv_bias,
        "shared_expert_intermediate_size": model.moe.shared_ffn,
        **write_qwen_experts(model),
    }


QWEN2_MOE = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    DENSE_NAMES
    | QKV_BIAS_NAMES
    | QWEN_EXPERT_NAMES
    | {
        "blocks.{layer}.mixture.shared.gate.weight": "model.layers.{layer}.mlp.shared_expert.gate_proj.weight",
        "blocks.{layer}.mixture.shared.up.weight": "model.layers.{layer}.mlp.shared_expert.up_proj.weight",
        "blocks.{layer}.mixture.shared.down.weight": "model.layers.{layer}.mlp.shared_expert.down_proj.weight",
        "blocks.{layer}.mixture.shared_gate.weight": "model.layers.{layer}.mlp.shared_expert_gate.weight",
    },
    read=_read,
    write=_write,
    always=frozenset({"moe", "moe.shared_ffn", "moe.shared_gate"}),
    may=QWEN_OPTIONS | {"qkv_bias"},
)
