"""Model families of Hugging Face, one file each; imports neither torch nor transformers.

A family is a table of names and two functions between config.json and ``ModelConfig``. To add one, write its file and
enter it in ``FAMILIES``.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from evermesh.checkpoint.naming import Naming, bind
from evermesh.checkpoint.stores.places import Place
from evermesh.checkpoint.stores.store import store_of
from evermesh.runtime.errors import UnsupportedModel
from evermesh.runtime.model.config import ModelConfig, MoeConfig
from evermesh.runtime.model.families.dots1 import DOTS1
from evermesh.runtime.model.families.family import ROUTER_BIAS_NAME, Family, options_of
from evermesh.runtime.model.families.llama import LLAMA
from evermesh.runtime.model.families.mistral import MISTRAL
from evermesh.runtime.model.families.mixtral import MIXTRAL
from evermesh.runtime.model.families.qwen2 import QWEN2
from evermesh.runtime.model.families.qwen2_moe import QWEN2_MOE
from evermesh.runtime.model.families.qwen3 import QWEN3
from evermesh.runtime.model.families.qwen3_moe import QWEN3_MOE
from evermesh.runtime.model.families.settings import TRAINS_ONLY, Settings

CONFIG = "config.json"
FAMILIES = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN2_MOE, QWEN3_MOE, DOTS1)
}
"""By ``model_type``. A model is written as the first that fits it."""
CHOICES = frozenset(
    {
        "rope_theta",
        "rope_scaling",
        "max_positions",
        "sliding_window",
        "window_layers",
        "initial_std",
        "moe.balancing",
        "moe.capacity_factor",
    }
)
"""What a job may set otherwise than the directory that its weights come from, such as to extend their context."""
_REPEATS_ROPE = "*.rotary_emb.inv_freq"
"""Old checkpoints hold it, although it follows from the settings."""


def read_model(directory: Place) -> ModelConfig:
    """The model that the config.json of a Hugging Face directory describes.

    Raises:
        UnsupportedModel: there is none, or a family or setting that this version does not know; names it.
    """
    values = _settings(directory)
    family = _family(values, directory)
    model = family.model(Settings(values, str(directory / CONFIG)))
    try:
        return ModelConfig.model_validate(model)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UnsupportedModel(f"{directory / CONFIG} describes no model that can be built: {problems}.") from error


def differences(model: ModelConfig, directory: Place) -> list[str]:
    """In which fields ``model`` is not the one of a Hugging Face directory, though its weights need it to be.

    Fields of ``CHOICES`` may differ: they fit any weights.

    Raises:
        UnsupportedModel: see ``read_model``.
    """
    mine, theirs = _fields(model), _fields(read_model(directory))
    return [
        f"{name} is {mine[name]}, there it is {theirs[name]}"
        for name in mine
        if name in theirs and name not in CHOICES and mine[name] != theirs[name]
    ]


def unused_settings(directory: Place) -> dict[str, Any]:
    """Settings for the training by transformers that this version neither takes over nor maps to others.

    Raises:
        UnsupportedModel: the config.json cannot be read.
    """
    values = _settings(directory)
    return {name: values[name] for name in TRAINS_ONLY if values.get(name)}


def naming_of(directory: Place, shapes: Mapping[str, Sequence[int]]) -> Naming:
    """How the parameters of a model, given with their whole shapes, are called in a Hugging Face directory.

    Raises:
        UnsupportedModel: see ``read_model``.
        ShardMapInvalid: a parameter has no name there.
    """
    return _naming(_family(_settings(directory), directory), shapes)


def written_form(model: ModelConfig, shapes: Mapping[str, Sequence[int]]) -> tuple[Family, Naming]:
    """The family as which ``model`` is written, and how its parameters are then called.

    Raises:
        UnsupportedModel: no family has all its options; names them.
    """
    family = next((family for family in FAMILIES.values() if not family.misfits(model)), None)
    if family is None:
        reasons = "; ".join(f"{family.model_type}: {', '.join(family.misfits(model))}" for family in FAMILIES.values())
        raise UnsupportedModel(
            f"no Hugging Face family has {_words(options_of(model))} together, so the model cannot be exported. {reasons}."
        )
    return family, _naming(family, shapes)


def _fields(model: ModelConfig) -> dict[str, Any]:
    """The fields of a model; those of its experts, if it has any, as ``moe.NAME``."""
    fields = {name: getattr(model, name) for name in ModelConfig.model_fields if name != "moe"}
    if model.moe is None:
        return fields | {"moe.experts": None}
    return fields | {f"moe.{name}": getattr(model.moe, name) for name in MoeConfig.model_fields}


def _naming(family: Family, shapes: Mapping[str, Sequence[int]]) -> Naming:
    tied = "head.weight" not in shapes  # some checkpoints repeat the embedding as head
    if ROUTER_BIAS_NAME in family.names:
        shapes = {**shapes, **router_bias_shapes(shapes)}
    return bind(family.names, shapes, (_REPEATS_ROPE, *([family.names["head.weight"]] if tied else [])))


def router_bias_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the biases of all routers, by their names in a ``Naming``, given those of a model's parameters."""
    weight = ".router.weight"
    biases = {n.removesuffix(weight) + ".router.bias": shape for n, shape in shapes.items() if n.endswith(weight)}
    return {name: tuple(shape[:1]) for name, shape in biases.items()}


def _family(values: Mapping[str, Any], directory: Place) -> Family:
    family = FAMILIES.get(values.get("model_type", ""))
    if family is None:
        raise UnsupportedModel(
            f"{directory / CONFIG}: model_type is {values.get('model_type')!r}, which this version does not know. "
            f"Use a model of {', '.join(FAMILIES)}."
        )
    return family


def _settings(directory: Place) -> dict[str, Any]:
    file = directory / CONFIG
    try:
        values = json.loads(store_of(file).read(file))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{file} cannot be read: {error}. Name a Hugging Face model directory.") from error
    if not isinstance(values, dict):
        raise UnsupportedModel(f"{file} is no JSON object. Name a Hugging Face model directory.")
    return values


def _words(options: frozenset[str]) -> str:
    return " + ".join(sorted(options)) or "no option"


__all__ = [
    "CHOICES",
    "CONFIG",
    "FAMILIES",
    "Family",
    "differences",
    "naming_of",
    "read_model",
    "router_bias_shapes",
    "unused_settings",
    "written_form",
]
