"""Reading a Hugging Face config.json so that nothing in it is passed over; imports neither torch nor transformers."""

from collections.abc import Mapping
from typing import Any

from evermesh.runtime.errors import UnsupportedModel

_COMPUTES_NOTHING = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "max_position_embeddings",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    }
)
"""Settings that change no logit, whatever their value."""
TRAINS_ONLY = ("router_aux_loss_coef",)
"""Settings that change the training by transformers alone and have no like here: reported, and mapped to nothing."""
_REQUIRED = object()


class Settings:
    """The settings of one config.json. Every one is taken, known to change nothing, or refused by ``finish``."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self._where = dict(values), where
        self._taken: set[str] = {*_COMPUTES_NOTHING, *TRAINS_ONLY}

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a setting; where it is missing or null, ``default``.

        Raises:
            UnsupportedModel: it is missing and has no default.
        """
        self._taken.add(name)
        value = self._values.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise UnsupportedModel(f"{self._where} has no {name}, which the model cannot be built without. Add it.")
        return default

    def expect(self, name: str, *allowed: Any) -> None:
        """Refuse a setting unless it is missing, null, or one of ``allowed``."""
        self._taken.add(name)
        value = self._values.get(name)
        if value is not None and value not in allowed:
            self.refuse(name, f"only {' or '.join(map(repr, allowed))} is supported")

    def refuse(self, name: str, fact: str) -> None:
        """Raise ``UnsupportedModel`` about a setting."""
        raise UnsupportedModel(
            f"{self._where}: {name} is {self._values.get(name)!r}, but {fact}. Use another model, or one without it."
        )

    def has(self, name: str) -> bool:
        """Whether a setting is there, null or not."""
        return name in self._values

    def is_taken(self, name: str) -> bool:
        """Whether a setting has been taken or expected."""
        return name in self._taken

    def finish(self) -> None:
        """Refuse what nobody asked for: it may change what the model computes."""
        unknown = sorted(self._values.keys() - self._taken)
        if unknown:
            shown = ", ".join(f"{name}: {self._values[name]!r}" for name in unknown[:5])
            raise UnsupportedModel(
                f"{self._where} has settings that this version does not know: {shown}. Remove those that change nothing in "
                "the model; others need a model that has them."
            )
