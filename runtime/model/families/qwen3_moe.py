"""Qwen3-MoE: Qwen3 with experts (Yang et al., arXiv 2505.09388)."""

from evermesh.runtime.model.families.experts import (
    QWEN_EXPERT_NAMES,
    QWEN_OPTIONS,
    read_qwen_experts,
    write_qwen_experts,
)
from evermesh.runtime.model.families.family import DENSE_NAMES, QK_NORM_NAMES, Family

QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    DENSE_NAMES | QK_NORM_NAMES | QWEN_EXPERT_NAMES,
    read=lambda settings: {"qk_norm": True, "moe": read_qwen_experts(settings)},
    write=lambda model: {"attention_bias": False, **write_qwen_experts(model)},
    always=frozenset({"qk_norm", "moe"}),
    may=QWEN_OPTIONS,
)
