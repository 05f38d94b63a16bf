"""Weights of Hugging Face directories: into a new run, and out of a checkpoint. transformers is not needed for either."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from evermesh.checkpoint import ShardMap, wanted_regions
from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.errors import WeightsUnusable
from evermesh.checkpoint.files import sync_directory, write_durably
from evermesh.checkpoint.format import Manifest
from evermesh.checkpoint.huggingface import WeightsRead, read_weights
from evermesh.checkpoint.huggingface_writing import WeightSource, write_weights
from evermesh.checkpoint.naming import Naming
from evermesh.checkpoint.regions import Box
from evermesh.checkpoint.safetensors_writing import MOST_FILE_BYTES, WeightsWritten
from evermesh.checkpoint.stores.places import Place
from evermesh.parallelism.collectives import Communicator
from evermesh.runtime.errors import UnsupportedModel
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.families import CONFIG, Family, differences, naming_of, written_form
from evermesh.runtime.model.families.family import ROUTER_BIAS_NAME
from evermesh.runtime.optimizer import ShardedOptimizer

PARAMETER = "parameter."
"""Of the weights among the tensors of a training state."""
_ROUTER_BIASES = "router_biases"
"""Among the objects of a training state."""
_WRITING = ".exporting-"


class InitialWeights(NamedTuple):
    """What a Hugging Face directory gave a run, besides the values of its parameters."""

    read: WeightsRead
    router_biases: list[list[float]]
    """As in ``Progress``; empty where the family has none."""


def load_initial_weights(
    directory: Place, model: ModelConfig, optimizer: ShardedOptimizer, shards: ShardMap, communicator: Communicator
) -> InitialWeights:
    """Give a new run the weights of a Hugging Face directory. Collective over the ranks that share a set of parameters.

    Every rank reads what it owns of the weights, in the type of the optimizer's copy (at least float32, so exactly), and
    gets the rest from the others; the moments stay zero. ``shards`` says who holds what of the optimizer's state;
    ``communicator`` is that of all training ranks.

    Raises:
        UnsupportedModel: ``directory`` holds another model, or one that this version does not know.
        WeightsUnusable: see ``evermesh.checkpoint.huggingface.read_weights``.
    """
    differing = differences(model, directory)
    if differing:
        raise UnsupportedModel(
            f"{directory} holds another model: {'; '.join(differing)}. Leave these keys of train.model out: they are then "
            "those of the directory."
        )
    whole = {name: t for name, t in shards.tensors.items() if name.startswith(PARAMETER)}
    held = {name: tensors for name, tensors in optimizer.owned_state().items() if name.startswith(PARAMETER)}
    wanted = wanted_regions(ShardMap(whole), communicator.rank, held)
    naming = naming_of(directory, {name.removeprefix(PARAMETER): tensor.shape for name, tensor in whole.items()})
    targets = {name.removeprefix(PARAMETER): regions for name, regions in wanted.items()}
    biases = {name: torch.empty(shape, dtype=torch.float64) for name, shape in _router_biases(model, naming).items()}
    for name, bias_E in biases.items():
        targets[name] = [(Box((0,), tuple(bias_E.shape)), bias_E)]  # every rank: they are the same everywhere
    read = read_weights(directory, naming, targets)
    optimizer.restore(steps=0)
    optimizer.publish()
    return InitialWeights(read, [bias_E.tolist() for bias_E in biases.values()])


def _router_biases(model: ModelConfig, naming: Naming) -> dict[str, tuple[int, ...]]:
    """Shapes of the router biases that a family has, by name, in the order of ``Progress.router_biases``."""
    layers = (layer for layer in range(model.layers) if model.has_experts(layer))
    names = (ROUTER_BIAS_NAME.format(layer=layer) for layer in layers)
    return {name: naming.shapes[name] for name in names if name in naming.shapes}


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What an export adds to a checkpoint, or chooses."""

    dtype: str | None = None
    """Type of the weights; None: the one that the run computed in."""
    max_positions: int | None = None
    """Longest context to announce, tokens; None: ``max_positions`` of the model, or else ``trained_context``."""
    trained_context: int | None = None
    """Longest sequence of the training, tokens."""
    tokenizer: Path | None = None
    """A tokenizer.json to put beside the weights."""
    end_token: int | None = None
    """Id of the token that ends documents."""
    most_file_bytes: int = MOST_FILE_BYTES


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote."""

    model_type: str
    weights: WeightsWritten
    dtype: str


def export_checkpoint(path: Place, directory: Path, options: ExportOptions) -> Exported:
    """Write the checkpoint at ``path`` as a Hugging Face directory, which appears when it is complete. Not collective.

    Raises:
        WeightsUnusable: ``directory`` is not empty, or the checkpoint is not one of a decoder.
        UnsupportedModel: no Hugging Face family has the options of the model, or its longest context is not known.
        CheckpointNotFound, CheckpointCorrupt: the checkpoint cannot be read.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise WeightsUnusable(directory, "it is there already and not empty", "Name a new directory.")
    manifest = read_manifest(path)
    shapes = {n.removeprefix(PARAMETER): t.shape for n, t in manifest.tensors.items() if n.startswith(PARAMETER)}
    if "model" not in manifest.description or "embedding.weight" not in shapes:
        raise WeightsUnusable(path, "it does not describe a decoder", "Name a checkpoint of `evermesh checkpoint ls`.")
    model = ModelConfig.model_validate(manifest.description["model"])
    dtype = options.dtype or str(manifest.description["dtype"])
    family, naming = written_form(model, shapes)
    config = _config_json(family, model, shapes["embedding.weight"][0], dtype, options)
    source = WeightSource(path, PARAMETER, dtype, _saved_router_biases(manifest, model, naming))
    temporary = directory.with_name(_WRITING + directory.name)
    shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
    temporary.mkdir(parents=True)
    try:
        written = write_weights(temporary, naming, source, options.most_file_bytes)
        _write_json(temporary / CONFIG, config)
        if options.tokenizer is not None:
            write_durably(temporary / "tokenizer.json", [options.tokenizer.read_bytes()])
            _write_json(temporary / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        sync_directory(temporary)
        os.rename(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(directory.parent)
    return Exported(family.model_type, written, dtype)


def _saved_router_biases(manifest: Manifest, model: ModelConfig, naming: Naming) -> dict[str, torch.Tensor]:
    """The biases of a checkpoint as a family with biases keeps them: in float32, whatever the type of the weights."""
    saved: Any = manifest.objects.get(_ROUTER_BIASES)
    values: list[list[float]] = saved["value"] if saved else []
    shapes = _router_biases(model, naming)
    if not shapes and any(map(any, values)):
        raise UnsupportedModel(
            "the routers of the checkpoint choose by biases too, which no Hugging Face family has for such a model, so it "
            "cannot be exported."
        )
    if not values:
        return {name: torch.zeros(shape) for name, shape in shapes.items()}
    return {name: torch.tensor(bias_E) for name, bias_E in zip(shapes, values, strict=True)} if shapes else {}


def _config_json(
    family: Family, model: ModelConfig, vocabulary: int, dtype: str, options: ExportOptions
) -> dict[str, Any]:
    max_positions = options.max_positions or model.max_positions or options.trained_context
    if max_positions is None:
        raise UnsupportedModel(
            "config.json needs the longest context that the weights are good for, and neither the model nor its run "
            "says it. Give it, in tokens, with --context."
        )
    settings = family.settings(model, vocabulary=vocabulary, max_positions=max_positions, dtype=dtype)
    return settings | {"bos_token_id": None, "eos_token_id": options.end_token}


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    write_durably(file, [json.dumps(values, indent=2, sort_keys=True).encode() + b"\n"])
