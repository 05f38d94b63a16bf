"""Our attention behind transformers' registry of attention functions.

A model asks the registry for the function that its configuration names, and hands it queries, keys and values of the
tokens that it was given. Ours looks up the micro-batch that the model is at, so the model needs no edit, and no mask: an
implementation without a mask function gets none (transformers, masking_utils).

Shape legend: B batch, always 1; T tokens; H query heads, K key/value heads; D head size.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from evermesh.parallelism.tensor.tokens import Attend
from evermesh.runtime.errors import UnsupportedModel

IMPLEMENTATION = "evermesh"
"""How transformers calls our attention."""
_HARMLESS = frozenset(
    {
        "cache_position",
        "is_causal",  # looked at by itself
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)
"""Arguments that models pass on to the attention function and that change no value of it."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a layer asked for."""

    layer: str
    """Name of the module."""
    index: int | None
    """``layer_idx`` of the module, where it has one."""
    window: int | None


class AttentionSlot:
    """Where a model finds the attention of the micro-batch that it is at.

    Args:
        model: all its modules will find this slot.
    """

    def __init__(self, model: nn.Module) -> None:
        self.attend: Attend | None = None
        self.calls: list[AttentionCall] = []
        """Since they were cleared last."""
        self._names = {id(module): name for name, module in model.named_modules()}
        for module in model.modules():
            _SLOTS[module] = self

    def call(self, module: nn.Module, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, window: int | None) -> Tensor:
        """[B, T, H, D], as transformers wants it."""
        if self.attend is None:
            raise UnsupportedModel(
                "the model was called outside of a training step, where its attention has no micro-batch. Use train_batch "
                "or evaluate, or read the saved weights into a model of its own (evermesh.runtime.own_model.read_weights)."
            )
        self.calls.append(AttentionCall(self._names[id(module)], getattr(module, "layer_idx", None), window))
        q_THD, k_TKD, v_TKD = (x.squeeze(0).transpose(0, 1) for x in (q_BHTD, k_BKTD, v_BKTD))
        return self.attend(q_THD, k_TKD, v_TKD, window=window).unsqueeze(0)


# by module and not by thread: recomputation runs in a thread of autograd where the device is a GPU
_SLOTS: "weakref.WeakKeyDictionary[nn.Module, AttentionSlot]" = weakref.WeakKeyDictionary()


def register() -> None:
    """Make our attention known to transformers. May be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attention_forward)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer: [B, T, H, D] from q [B, H, T, D] and k, v [B, K, T, D].

    Raises:
        UnsupportedModel: the layer asks for something that this attention cannot do, or has no part in a parallel model.
    """
    slot = _SLOTS.get(module)
    if slot is None:
        raise UnsupportedModel(
            f"{type(module).__name__} asks for the attention {IMPLEMENTATION!r}, but its model was not given to "
            "evermesh.parallelize. Set attn_implementation to 'sdpa' to run it alone."
        )
    _refuse(
        module,
        [
            ("an attention mask", attention_mask is not None),
            (f"dropout {dropout}", dropout > 0),
            (
                "attention to later tokens",
                getattr(module, "is_causal", True) is False or others.get("is_causal") is False,
            ),
            (f"a batch of {query.shape[0]} rows", query.shape[0] != 1),
            (f"{query.shape[2]} queries for {key.shape[2]} keys", query.shape[2] != key.shape[2]),
            (f"values of size {value.shape[-1]} with keys of {key.shape[-1]}", value.shape[-1] != key.shape[-1]),
            *(
                (name, given is not None and given is not False and name not in _HARMLESS)
                for name, given in others.items()
            ),
        ],
    )
    if scaling is not None and scaling != query.shape[-1] ** -0.5:
        query = query * (scaling * query.shape[-1] ** 0.5)  # the kernels divide by the root of the head size
    return slot.call(module, query, key, value, sliding_window), None


def _refuse(module: nn.Module, asked: Sequence[tuple[str, bool]]) -> None:
    found = [what for what, is_asked in asked if is_asked]
    if found:
        raise UnsupportedModel(
            f"{type(module).__name__} asks its attention for {', '.join(found)}; packs and rings know causal attention "
            "with or without a sliding window, and nothing else. Set what asks for it to zero or none in the model's "
            "configuration, or train another model."
        )
