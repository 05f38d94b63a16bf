"""Writes the weights of a checkpoint as Hugging Face keeps them: safetensors files of limited size, and their index."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import WeightsUnusable
from evermesh.checkpoint.files import sync_directory, write_checksummed, write_durably
from evermesh.checkpoint.filling import Target
from evermesh.checkpoint.format import FilePart, safetensors_header
from evermesh.checkpoint.huggingface import INDEX, SINGLE
from evermesh.checkpoint.loading import load
from evermesh.checkpoint.naming import ForeignPart, Naming
from evermesh.checkpoint.regions import Box, StoredForm
from evermesh.checkpoint.stores.places import Place
from evermesh.checkpoint.tensors import dtype_name, host_slices

MOST_FILE_BYTES = 5_000_000_000
"""As transformers writes them."""
_GROUP_BYTES = 256 << 20
"""Tensors are read from the checkpoint in groups of about this size."""
_METADATA = {"format": "pt"}
"""Readers ask for it: elements are laid out as torch does."""


@dataclass(frozen=True, slots=True)
class WeightsWritten:
    """What ``write_weights`` wrote."""

    files: tuple[str, ...]
    num_bytes: int
    """Of all tensors."""


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
    directory: Path, naming: Naming, source: WeightSource, most_file_bytes: int = MOST_FILE_BYTES
) -> WeightsWritten:
    """Write all weights of a checkpoint into ``directory``, which exists and holds none yet. Not collective.

    Every chunk of the checkpoint that is read is verified. Extra memory is about 256 MiB, or the largest tensor. Returns
    when all bytes are on the disk.

    Raises:
        WeightsUnusable: the checkpoint has other tensors than ``naming``; nothing was written.
        CheckpointNotFound, CheckpointCorrupt: the checkpoint cannot be read.
    """
    _check(source, naming)
    places = _places(naming)
    dtypes = {name: _dtype_written(source, ours) for name, [(ours, _), *_] in places.items()}
    names = _names(naming, dtypes, most_file_bytes)
    for file, of_file in names.items():
        parts = [_file_part(name, naming.foreign_shapes[name], dtypes[name]) for name in of_file]
        payloads = _payloads(of_file, places, naming, source)
        write_checksummed(directory / file, itertools.chain([safetensors_header(parts, _METADATA)], payloads))
    num_bytes = sum(_num_bytes(shape, dtypes[name]) for name, shape in naming.foreign_shapes.items())
    if len(names) > 1:
        weight_map = {name: file for file, of_file in names.items() for name in of_file}
        index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_durably(directory / INDEX, [json.dumps(index, indent=2).encode()])
    sync_directory(directory)
    return WeightsWritten(tuple(names), num_bytes)


def _check(source: WeightSource, naming: Naming) -> None:
    tensors = read_manifest(source.path).tensors
    there = {name.removeprefix(source.prefix): t.shape for name, t in tensors.items() if name.startswith(source.prefix)}
    there |= {name: tuple(tensor.shape) for name, tensor in source.more.items()}
    if there != naming.shapes:
        differing = sorted(
            name for name in there.keys() | naming.shapes.keys() if there.get(name) != naming.shapes.get(name)
        )
        raise WeightsUnusable(
            source.path,
            f"its tensors are not those of the model: {', '.join(differing[:5])}",
            "Export it with the configuration of its own run.",
        )


def _dtype_written(source: WeightSource, ours: str) -> str:
    return dtype_name(source.more[ours]) if ours in source.more else source.dtype


def _names(naming: Naming, dtypes: Mapping[str, str], most_file_bytes: int) -> dict[str, list[str]]:
    """Which file holds which of their tensors: filled one after the other; a tensor larger than a file has its own."""
    files: list[list[str]] = [[]]
    free = most_file_bytes
    for name, shape in naming.foreign_shapes.items():
        num_bytes = _num_bytes(shape, dtypes[name])
        if num_bytes > free and files[-1]:
            files.append([])
            free = most_file_bytes
        files[-1].append(name)
        free -= num_bytes
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {f"model-{i:05d}-of-{len(files):05d}.safetensors": names for i, names in enumerate(files, start=1)}


def _places(naming: Naming) -> dict[str, list[tuple[str, ForeignPart]]]:
    """By their names: which boxes of which of our tensors lie in a tensor."""
    places: dict[str, list[tuple[str, ForeignPart]]] = {name: [] for name in naming.foreign_shapes}
    for ours, parts in naming.parts.items():
        for part in parts:
            places[part.name].append((ours, part))
    return places


def _payloads(
    names: Sequence[str],
    places: Mapping[str, Sequence[tuple[str, ForeignPart]]],
    naming: Naming,
    source: WeightSource,
) -> Iterator[memoryview]:
    """The bytes of their tensors, one after the other."""
    dtypes = {name: tensor.dtype for name, tensor in read_manifest(source.path).tensors.items()}
    for group in _groups(names, naming):
        wanted: dict[str, list[Target]] = {}
        tensors: list[torch.Tensor] = []
        for name in group:
            [(first, _), *_] = places[name]
            if first in source.more:
                tensors.append(source.more[first].flatten())
                continue
            dtype = getattr(torch, dtypes[source.prefix + first])
            tensors.append(torch.empty(math.prod(naming.foreign_shapes[name]), dtype=dtype))
            for ours, part in places[name]:
                there = tensors[-1][part.start : part.start + part.box.num_elements]
                wanted.setdefault(source.prefix + ours, []).append((part.box, there))
        load(source.path, wanted, strict=False)
        for name, tensor in zip(group, tensors, strict=True):
            dtype = getattr(torch, _dtype_written(source, places[name][0][0]))
            yield from host_slices(tensor.to(dtype), 0, tensor.numel())


def _groups(names: Sequence[str], naming: Naming) -> Iterator[list[str]]:
    group: list[str] = []
    num_bytes = 0
    for name in names:
        size = _num_bytes(naming.foreign_shapes[name], "float32")
        if group and num_bytes + size > _GROUP_BYTES:
            yield group
            group, num_bytes = [], 0
        group.append(name)
        num_bytes += size
    if group:
        yield group


def _file_part(name: str, shape: tuple[int, ...], dtype: str) -> FilePart:
    return FilePart(name, dtype, Box((0,) * len(shape), shape), 0, math.prod(shape), StoredForm(shape))


def _num_bytes(shape: Sequence[int], dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].num_bytes
