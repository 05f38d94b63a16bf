"""Qwen2 and Qwen2.5: LLaMA with biases on queries, keys and values (Yang et al., arXiv 2407.10671)."""

from evermesh.runtime.model.families.family import DENSE_NAMES, QKV_BIAS_NAMES, Family
from evermesh.runtime.model.families.windows import read_window_layers, write_window_layers

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    DENSE_NAMES | QKV_BIAS_NAMES,
    read=lambda settings: {"qkv_bias": True, **read_window_layers(settings)},
    write=write_window_layers,
    always=frozenset({"qkv_bias"}),
    may=frozenset({"sliding_window", "window_layers"}),
)
