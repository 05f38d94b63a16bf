"""What is found out about a model before anything is changed: whether it can be trained here without another result.

Everything that would depend on what else is in a micro-batch, or that our attention would silently leave out, is refused
at once, on every rank alike. What configurations do not say is found by a forward pass of two tokens without kernels.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.tiers import Tiers
from evermesh.runtime.data.errors import ExtraMissing
from evermesh.runtime.errors import UnsupportedModel
from evermesh.runtime.own_model.attention import IMPLEMENTATION, AttentionCall, AttentionSlot, register

_SLIDING = "sliding_attention"
_LAYER_TYPES = {"full_attention", _SLIDING}
_MOVING_ROPE = {"dynamic", "longrope"}
"""Rotary frequencies that follow the longest sequence of a call."""


def check_layout(layout: Layout) -> None:
    """Return if ``layout`` has only axes that a model of transformers can be spread over.

    Raises:
        LayoutDoesNotFit: names the axis, its degree, and what is there instead.
    """
    for axis in ("pp", "ep", "etp"):
        degree = getattr(layout, axis)
        if degree > 1:
            raise LayoutDoesNotFit(
                f"layout.{axis} is {degree}, but a model of transformers is spread over hdp and tp only, its parameters "
                f"sharded over hdp. Set layout.{axis} to 1; {layout.world_size} ranks can be "
                f"hdp {layout.world_size // layout.tp} x tp {layout.tp}.",
                axis=axis,
            )
    if layout.tp_chunks > 1:
        raise LayoutDoesNotFit(
            f"layout.tp_chunks is {layout.tp_chunks}, but the layers of a model of transformers see all tokens at once: "
            "nothing is gathered in parts. Leave it out.",
            axis="tp_chunks",
        )
    if layout.activations not in ("keep", "recompute"):
        raise LayoutDoesNotFit(
            f"layout.activations is {layout.activations}, but the layers of a model of transformers either all keep their "
            "activations or all compute them again. Set it to keep or to recompute.",
            axis="activations",
        )
    if layout.sharding != Tiers():
        raise LayoutDoesNotFit(
            f"layout.sharding is {layout.sharding}, but FSDP2 divides a model of transformers: everything, for a step. Leave "
            "it out.",
            axis="sharding",
        )
    for axis in ("hot_experts", "offload"):
        if getattr(layout, axis):
            raise LayoutDoesNotFit(
                f"layout.{axis} is {getattr(layout, axis)}, which a model of transformers cannot have here. Leave it out.",
                axis=axis,
            )


def text_config(model: nn.Module) -> Any:
    """The configuration of a model of transformers, of its text part where it has others.

    Raises:
        ExtraMissing: transformers is not installed.
        UnsupportedModel: the model is of somebody else.
    """
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ExtraMissing(
            "evermesh.parallelize takes models of transformers, which is not installed. Run: pip install 'evermesh[hf]'"
        ) from error
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModel(
            f"{type(model).__name__} is no model of transformers, whose registry of attention functions carries packs and "
            "rings into a model. Give one made by AutoModelForCausalLM.from_config or from_pretrained."
        )
    return model.config.get_text_config()


def examine(model: nn.Module, config: Any, layout: Layout) -> AttentionSlot:
    """Set our attention, prove that the model uses it and nothing else, and return where it finds its micro-batch.

    Raises:
        UnsupportedModel: names what the model has that would give another result here, and the way out.
    """
    _check_config(config)
    dropouts = [
        f"{name} {part.p}" for name, part in model.named_modules() if isinstance(part, nn.Dropout) and part.p > 0
    ]
    if dropouts:
        raise UnsupportedModel(
            f"{type(model).__name__} has dropout ({first_few(dropouts)}), which would depend on how "
            "documents are packed. Set it to 0 in the model's configuration."
        )
    _set_attention(model)
    slot = AttentionSlot(model)
    _check_calls(_calls_of_probe(model, slot), model, config)
    _set_recompute(model, layout)
    return slot


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers says must not be split, in the order of the model."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    found: list[nn.Module] = []
    for module in model.modules():
        inside = any(module is part for outer in found for part in outer.modules())
        if type(module).__name__ in names and not inside:
            found.append(module)
    return found


def _check_config(config: Any) -> None:
    types = set(getattr(config, "layer_types", None) or ())
    if types - _LAYER_TYPES:
        raise UnsupportedModel(
            f"the model has layers of {', '.join(sorted(types - _LAYER_TYPES))}; packs and rings know "
            f"{' and '.join(sorted(_LAYER_TYPES))}. A ring would cut such a layer's document without a word."
        )
    ropes = {rope for rope in _rope_types(getattr(config, "rope_parameters", None)) if rope in _MOVING_ROPE}
    if ropes:
        raise UnsupportedModel(
            f"rotary positions of type {', '.join(sorted(ropes))} depend on the longest document of a micro-batch, so the "
            "result would depend on the plan. Use linear, yarn or llama3 in rope_parameters."
        )
    if getattr(config, "output_router_logits", False):
        raise UnsupportedModel(
            "the model asks for the auxiliary loss of its routers (output_router_logits), which weighs whatever is in one "
            "micro-batch. Set it to false; the loss is then that of the tokens alone."
        )


def _rope_types(parameters: Any) -> Iterator[str]:
    """Of one set of rotary settings, or of one for every type of layer."""
    if not isinstance(parameters, dict):
        return
    yield parameters.get("rope_type", "default")
    for nested in parameters.values():
        yield from _rope_types(nested)


def _set_attention(model: Any) -> None:
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:  # transformers only warns
        raise _not_through_registry(model, "has attention of its own, which cannot be set")


def _calls_of_probe(model: Any, slot: AttentionSlot) -> list[AttentionCall]:
    def nothing(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, /, *, window: int | None = None) -> Tensor:
        return torch.zeros_like(q_THD)

    slot.attend = nothing
    device = next(model.parameters()).device
    ids, positions = torch.zeros(1, 2, dtype=torch.int64, device=device), torch.arange(2, device=device).unsqueeze(0)
    try:
        with torch.no_grad():
            model(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        slot.attend = None
    calls, slot.calls = slot.calls, []
    return calls


def _check_calls(calls: list[AttentionCall], model: nn.Module, config: Any) -> None:
    if len(calls) != config.num_hidden_layers:
        raise _not_through_registry(
            model, f"asked the registry for attention {len(calls)} times in {config.num_hidden_layers} layers"
        )
    for call in calls:
        window = _window(config, call.index)
        if call.window != window:
            raise UnsupportedModel(
                f"{call.layer} asks its attention for a window of {call.window} tokens, its configuration says {window}. "
                "The mask that would have settled it is not built here, so the layer would see other tokens than alone."
            )


def _window(config: Any, layer: int | None) -> int | None:
    """Tokens that a layer sees; None: all before it."""
    types = getattr(config, "layer_types", None)
    if types and (layer is None or types[layer] != _SLIDING):
        return None
    return getattr(config, "sliding_window", None)


def _set_recompute(model: Any, layout: Layout) -> None:
    if layout.recompute == "none":
        return
    if not model.supports_gradient_checkpointing:
        raise UnsupportedModel(
            f"layout.activations is {layout.activations!r}, but {type(model).__name__} cannot recompute its layers. "
            "Set it to keep."
        )
    if hasattr(model, "activation_checkpointing_enable"):  # so it is called in newer releases of transformers 5
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def first_few(names: Sequence[str]) -> str:
    """Three of them, and whether there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _not_through_registry(model: nn.Module, fact: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(model).__name__} {fact}: documents in a pack would see each other, and rings would not be there. Train a "
        "model whose layers all ask ALL_ATTENTION_FUNCTIONS of transformers (its class has _supports_attention_backend)."
    )
