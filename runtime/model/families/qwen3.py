"""Qwen3: LLaMA with norms of every head's queries and keys (Yang et al., arXiv 2505.09388)."""

from evermesh.runtime.model.families.family import DENSE_NAMES, QK_NORM_NAMES, Family
from evermesh.runtime.model.families.windows import read_window_layers, write_window_layers

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    DENSE_NAMES | QK_NORM_NAMES,
    read=lambda settings: {"qk_norm": True, **read_window_layers(settings)},
    write=lambda model: {"attention_bias": False, **write_window_layers(model)},
    always=frozenset({"qk_norm"}),
    may=frozenset({"sliding_window", "window_layers"}),
    default_head_dim=128,
)
