"""LLaMA 1 to 3: what the default model is (Touvron et al., arXiv 2302.13971)."""

from evermesh.runtime.model.families.family import DENSE_NAMES, Family

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    DENSE_NAMES,
    write=lambda model: {"attention_bias": False, "mlp_bias": False},
)
