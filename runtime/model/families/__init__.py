"""Model families of Hugging Face, one file each; imports neither torch nor transformers.

A family is a table of names and two functions between config.json and ``ModelConfig``. To add one, write its file and
enter it in ``FAMILIES``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evermesh.checkpoint.naming import Naming, bind
from evermesh.runtime.errors import UnsupportedModel
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.families.family import Family, options_of
from evermesh.runtime.model.families.llama import LLAMA
from evermesh.runtime.model.families.mistral import MISTRAL
from evermesh.runtime.model.families.mixtral import MIXTRAL
from evermesh.runtime.model.families.qwen2 import QWEN2
from evermesh.runtime.model.families.qwen3 import QWEN3
from evermesh.runtime.model.families.qwen3_moe import QWEN3_MOE
from evermesh.runtime.model.families.settings import Settings

CONFIG = "config.json"
FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, MIXTRAL, QWEN3_MOE)}
"""By ``model_type``. A model is written as the first that fits it."""
CHOICES = frozenset({"rope_theta", "rope_scaling", "max_positions", "sliding_window", "window_layers", "initial_std"})
"""What a job may set otherwise than the directory that its weights come from, such as to extend their context."""
_REPEATS_ROPE = "*.rotary_emb.inv_freq"
"""Old checkpoints hold it, although it follows from the settings."""


def read_model(directory: Path) -> ModelConfig:
    """The model that the config.json of a Hugging Face directory describes.

    Raises:
        UnsupportedModel: there is none, or a family or setting that this version does not know; names it.
    """
    values = _settings(directory)
    family = _family(values, directory)
    model = family.model(Settings(values, str(directory / CONFIG)))
    if "moe" in model and "moe" not in ModelConfig.model_fields:
        raise UnsupportedModel(
            f"{directory / CONFIG}: model_type is {family.model_type!r}, whose experts this version cannot train. "
            f"Use a model of {', '.join(name for name, other in FAMILIES.items() if 'moe' not in other.always)}."
        )
    try:
        return ModelConfig.model_validate(model)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise UnsupportedModel(f"{directory / CONFIG} describes no model that can be built: {problems}.") from error


def differences(model: ModelConfig, directory: Path) -> list[str]:
    """In which fields ``model`` is not the one of a Hugging Face directory, though its weights need it to be.

    Fields of ``CHOICES`` may differ: they fit any weights.

    Raises:
        UnsupportedModel: see ``read_model``.
    """
    there = read_model(directory)
    return [
        f"{name} is {getattr(model, name)}, there it is {getattr(there, name)}"
        for name in ModelConfig.model_fields
        if name not in CHOICES and getattr(model, name) != getattr(there, name)
    ]


def naming_of(directory: Path, shapes: Mapping[str, Sequence[int]]) -> Naming:
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
    family = next((family for family in FAMILIES.values() if family.fits(model)), None)
    if family is None:
        forms = "; ".join(
            f"{f.model_type}: {_words(f.always)} and, if wanted, {_words(f.may)}" for f in FAMILIES.values()
        )
        raise UnsupportedModel(
            f"no Hugging Face family has {_words(options_of(model))} together, so the model cannot be exported. "
            f"Families and their options: {forms}."
        )
    return family, _naming(family, shapes)


def _naming(family: Family, shapes: Mapping[str, Sequence[int]]) -> Naming:
    tied = "head.weight" not in shapes  # some checkpoints repeat the embedding as head
    return bind(family.names, shapes, (_REPEATS_ROPE, *([family.names["head.weight"]] if tied else [])))


def _family(values: Mapping[str, Any], directory: Path) -> Family:
    family = FAMILIES.get(values.get("model_type", ""))
    if family is None:
        raise UnsupportedModel(
            f"{directory / CONFIG}: model_type is {values.get('model_type')!r}, which this version does not know. "
            f"Use a model of {', '.join(FAMILIES)}."
        )
    return family


def _settings(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{file} cannot be read: {error}. Name a Hugging Face model directory.") from error
    if not isinstance(values, dict):
        raise UnsupportedModel(f"{file} is no JSON object. Name a Hugging Face model directory.")
    return values


def _words(options: frozenset[str]) -> str:
    return " + ".join(sorted(options)) or "no option"


__all__ = ["CHOICES", "CONFIG", "FAMILIES", "Family", "differences", "naming_of", "read_model", "written_form"]
