"""Writes the weights of a checkpoint as Hugging Face keeps them, under the names of a table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from evermesh.checkpoint.contents import Content, Piece
from evermesh.checkpoint.errors import WeightsUnusable
from evermesh.checkpoint.naming import ForeignPart, Naming
from evermesh.checkpoint.opening import open_checkpoint
from evermesh.checkpoint.safetensors_writing import MOST_FILE_BYTES, WeightsWritten, write_safetensors
from evermesh.checkpoint.sources import Source
from evermesh.checkpoint.stores.places import Place
from evermesh.checkpoint.tensors import dtype_name


@dataclass(frozen=True, slots=True)
class WeightSource:
    """The weights of a checkpoint under their names there."""

    path: Place
    """Of the checkpoint."""
    prefix: str
    """What its tensors have before the names of ``Naming``."""
    dtype: str
    """Type to write; values are converted to it, rounded to the nearest if it is narrower."""
    more: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What the checkpoint does not keep as tensors, by the names of ``Naming``; written in the types that they have."""


def write_weights(
    directory: Path, naming: Naming, weights: WeightSource, most_file_bytes: int = MOST_FILE_BYTES
) -> WeightsWritten:
    """Write all weights of a checkpoint into ``directory``, which exists and holds none yet. Not collective.

    Every chunk of the checkpoint that is read is verified. Extra memory is about 256 MiB. Returns when all bytes are on
    the disk.

    Raises:
        WeightsUnusable: the checkpoint has other tensors than ``naming``; nothing was written.
        CheckpointNotFound, CheckpointCorrupt: the checkpoint cannot be read.
    """
    source = open_checkpoint(weights.path)
    _check(source, weights, naming)
    contents = {name: _content(weights, naming.foreign_shapes[name], parts) for name, parts in _places(naming).items()}
    return write_safetensors(directory, source, contents, most_file_bytes=most_file_bytes)


def _check(source: Source, weights: WeightSource, naming: Naming) -> None:
    prefix = weights.prefix
    there = {name.removeprefix(prefix): t.shape for name, t in source.tensors.items() if name.startswith(prefix)}
    there |= {name: tuple(tensor.shape) for name, tensor in weights.more.items()}
    if there != naming.shapes:
        differing = sorted(
            name for name in there.keys() | naming.shapes.keys() if there.get(name) != naming.shapes.get(name)
        )
        raise WeightsUnusable(
            weights.path,
            f"its tensors are not those of the model: {', '.join(differing[:5])}",
            "Export it with the configuration of its own run.",
        )


def _places(naming: Naming) -> dict[str, list[tuple[str, ForeignPart]]]:
    """By their names: which boxes of which of our tensors lie in a tensor."""
    places: dict[str, list[tuple[str, ForeignPart]]] = {name: [] for name in naming.foreign_shapes}
    for ours, parts in naming.parts.items():
        for part in parts:
            places[part.name].append((ours, part))
    return places


def _content(weights: WeightSource, shape: tuple[int, ...], parts: list[tuple[str, ForeignPart]]) -> Content:
    """One of their tensors."""
    [(first, _), *_] = parts
    if first in weights.more:
        values = weights.more[first].contiguous()
        return Content(dtype_name(values), shape, values=values)
    pieces = (Piece(weights.prefix + ours, part.box, part.start) for ours, part in parts)
    return Content(weights.dtype, shape, tuple(pieces))
