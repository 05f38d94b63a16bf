"""Mixtral: Mistral with experts in every layer (Jiang et al., arXiv 2401.04088)."""

from typing import Any

from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.families.family import ATTENTION_NAMES, Family
from evermesh.runtime.model.families.settings import Settings


def _experts(settings: Settings) -> dict[str, Any]:
    settings.expect("router_jitter_noise", 0.0)
    return {
        "sliding_window": settings.take("sliding_window", None),
        "moe": {
            "experts": settings.take("num_local_experts"),
            "top_k": settings.take("num_experts_per_tok"),
            "ffn": settings.take("intermediate_size"),
            "normalise_weights": True,
        },
    }


def _settings(model: ModelConfig) -> dict[str, Any]:
    assert model.moe is not None, "the family is one of models with experts"
    return {
        "sliding_window": model.sliding_window,
        "intermediate_size": model.moe.ffn,  # ``ffn`` of the model itself is that of dense layers, and there are none
        "num_local_experts": model.moe.experts,
        "num_experts_per_tok": model.moe.top_k,
        "router_aux_loss_coef": 0.0,  # a loss per batch of theirs, which no run here has had
    }


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    ATTENTION_NAMES
    | {
        "blocks.{layer}.mixture.router.weight": "model.layers.{layer}.block_sparse_moe.gate.weight",
        "blocks.{layer}.mixture.experts.gate": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
        "blocks.{layer}.mixture.experts.down": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",
        "blocks.{layer}.mixture.experts.up": "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
    },
    read=_experts,
    write=_settings,
    always=frozenset({"moe"}),
    may=frozenset({"sliding_window"}),
    default_theta=1_000_000.0,
)
