"""Experts as Qwen2-MoE and Qwen3-MoE name and describe them; a dense layer may stand anywhere between theirs."""

from typing import Any

from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.families.settings import Settings

QWEN_EXPERT_NAMES = {
    "blocks.{layer}.mixture.router.weight": "model.layers.{layer}.mlp.gate.weight",
    "blocks.{layer}.mixture.experts.gate": "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
    "blocks.{layer}.mixture.experts.up": "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    "blocks.{layer}.mixture.experts.down": "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",
}
QWEN_OPTIONS = frozenset({"moe.normalise_weights", "moe.first_dense_layers", "moe.period"})


def read_qwen_experts(settings: Settings) -> dict[str, Any]:
    """Values of ``MoeConfig``."""
    settings.expect("use_sliding_window", False)
    for unused in ("sliding_window", "max_window_layers"):
        settings.take(unused, None)  # windows are off
    return {
        "experts": settings.take("num_local_experts" if settings.has("num_local_experts") else "num_experts"),
        "top_k": settings.take("num_experts_per_tok"),
        "ffn": settings.take("moe_intermediate_size"),
        "normalise_weights": settings.take("norm_topk_prob", False),
        **_read_places(settings),
    }


def write_qwen_experts(model: ModelConfig) -> dict[str, Any]:
    """The settings of experts, of the layers that have them, and of windows, which are off."""
    assert model.moe is not None, "the family is one of models with experts"
    dense = [layer for layer in range(model.layers) if not model.has_experts(layer)]
    return {
        "moe_intermediate_size": model.moe.ffn,
        "num_experts": model.moe.experts,
        "num_experts_per_tok": model.moe.top_k,
        "norm_topk_prob": model.moe.normalise_weights,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "router_aux_loss_coef": 0.0,  # a loss per batch of theirs, which no run here has had
        "use_sliding_window": False,
    }


def _read_places(settings: Settings) -> dict[str, int]:
    """``first_dense_layers`` and ``period``: theirs may leave out any layers, ours have a rhythm."""
    step, dense = settings.take("decoder_sparse_step", 1), settings.take("mlp_only_layers", [])
    layers = settings.take("num_hidden_layers")
    sparse = [layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0]
    for first in range(layers):
        for period in range(1, layers - first + 1):
            if sparse == list(range(first + period - 1, layers, period)):
                return {"first_dense_layers": first, "period": period}
    settings.refuse(
        "mlp_only_layers" if dense else "decoder_sparse_step",
        f"with it layers {sparse} have experts, which is not every n-th layer above some dense ones",
    )
    raise AssertionError("refused")
