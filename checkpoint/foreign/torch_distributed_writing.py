"""Writes checkpoints as torch.distributed.checkpoint (DCP) does: ``.metadata``, and files of chunks for every rank.

Names are those of ``get_state_dict(model, optimizer)`` under ``model`` and ``optimizer``, by convention, so that
``dcp.load({"model": ..., "optimizer": ...})`` finds them in any sharding. Every chunk is a file of ``torch.save`` inside a
file. Metadata are described with torch's own classes.
"""

import itertools
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from evermesh.checkpoint.contents import Content, Stream, Tell, shard, whole
from evermesh.checkpoint.foreign.torch_distributed import METADATA
from evermesh.checkpoint.foreign.torch_writing import TorchFile, contents_of
from evermesh.checkpoint.foreign.training import AS_THEY_ARE, BUFFER_NAMES, CLIENT, GROUPS, MODEL, STATE, Training
from evermesh.checkpoint.regions import Box

_VERSION = "1.0.0"
_LEAST_CHUNK_BYTES = 1 << 16
"""A tensor is divided among so many ranks that each has at least this much."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """A chunk of a tensor, or an object."""

    name: str
    rank: int
    file: TorchFile
    box: Box | None = None
    """None: an object."""


def write_torch_distributed(directory: Path, training: Training, ranks: int, tell: Tell | None = None) -> None:
    """Write a training state into ``directory``, which exists and is empty, divided among files of ``ranks`` ranks."""
    tensors = dict(_tensors(training))
    entries = sorted(_entries(training, tensors, ranks), key=lambda entry: entry.rank)
    stream = Stream(training.source, contents_of(entry.file for entry in entries), tell)
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for rank, of_rank in itertools.groupby(entries, key=lambda entry: entry.rank):
        name = f"__{rank}_0.distcp"
        with (directory / name).open("wb") as file:
            for entry in of_rank:
                start = file.tell()
                num_bytes = entry.file.write(file, stream)
                offset = entry.box.offsets if entry.box is not None else None
                storage[MetadataIndex(entry.name, offset)] = _StorageInfo(name, start, num_bytes)
    metadata = _metadata(training, tensors, entries, storage)
    (directory / METADATA).write_bytes(pickle.dumps(metadata))


def _tensors(training: Training) -> Iterator[tuple[str, Content | str]]:
    """By their names there: tensors of the source, or numbers."""
    for name, tensor in (*training.parameters.items(), *training.buffers.items()):
        yield MODEL + name, tensor
    for kind, of_kind in training.states.items():
        for name, tensor in of_kind.items():
            yield f"{STATE}{name}.{kind}", tensor
    for group in training.groups:
        for key, value in group.numbers.items():
            if isinstance(value, float):
                for name in group.names:
                    yield f"{STATE}{name}.{key}", Content("float32", (), values=torch.tensor(value))
    for name, tensor in training.client.items():
        yield CLIENT + name, tensor
    for tensor in training.others:
        yield tensor, tensor


def _objects(training: Training) -> Iterator[tuple[str, Any]]:
    yield from training.objects.items()
    if training.source.step is not None:
        yield "step", training.source.step
    if not training.parameters:
        yield AS_THEY_ARE, True
    if training.buffers:
        yield BUFFER_NAMES, list(training.buffers)
    for index, group in enumerate(training.groups):
        settings = {key: tuple(v) if isinstance(v, list) else v for key, v in group.settings.items()}
        for key, value in ({"params": list(group.names)} | settings).items():
            yield f"{GROUPS}{index}.{key}", value
        for key, value in group.numbers.items():
            if not isinstance(value, float):
                yield from ((f"{STATE}{name}.{key}", value) for name in group.names)


def _entries(training: Training, tensors: Mapping[str, Content | str], ranks: int) -> Iterator[_Entry]:
    for index, (name, tensor) in enumerate(tensors.items()):
        if isinstance(tensor, Content):
            yield _Entry(name, 0, TorchFile(tensor), Box((0,) * len(tensor.shape), tensor.shape))
            continue
        content = whole(training.source, tensor)
        for rank, box in enumerate(_boxes(content, ranks)):
            # small tensors go round, so that no rank has all of them
            at = (index + rank) % ranks
            yield _Entry(name, at, TorchFile(shard(training.source, tensor, box)), box)
    for name, value in _objects(training):
        yield _Entry(name, 0, TorchFile(value))


def _boxes(content: Content, ranks: int) -> Iterator[Box]:
    """Rows of a tensor, as FSDP cuts it."""
    shape = content.shape
    if not shape or not content.num_elements:
        yield Box((0,) * len(shape), shape)
        return
    parts = max(1, min(ranks, shape[0], content.num_bytes // _LEAST_CHUNK_BYTES))
    rows = -(-shape[0] // parts)
    for start in range(0, shape[0], rows):
        yield Box((start, *(0,) * (len(shape) - 1)), (min(rows, shape[0] - start), *shape[1:]))


def _metadata(
    training: Training,
    tensors: Mapping[str, Content | str],
    entries: list[_Entry],
    storage: dict[MetadataIndex, _StorageInfo],
) -> Metadata:
    described: dict[str, Any] = {}
    for entry in entries:
        if entry.box is None:
            described[entry.name] = BytesStorageMetadata()
            continue
        known = described.setdefault(entry.name, _described(training, tensors[entry.name]))
        known.chunks.append(ChunkStorageMetadata(torch.Size(entry.box.offsets), torch.Size(entry.box.sizes)))
    for alias, name in training.aliases.items():  # tied weights are stored once, under both names
        described[MODEL + alias] = described[MODEL + name]
        for chunk in described[MODEL + name].chunks:
            storage[MetadataIndex(MODEL + alias, chunk.offsets)] = storage[MetadataIndex(MODEL + name, chunk.offsets)]
    for one in described.values():
        if isinstance(one, TensorStorageMetadata):
            one.chunks.sort(key=lambda chunk: tuple(chunk.offsets))
    paths = {name: _path(name) for name in described}
    return Metadata(described, paths, storage, StorageMeta(), _VERSION)


def _described(training: Training, tensor: Content | str) -> TensorStorageMetadata:
    content = tensor if isinstance(tensor, Content) else whole(training.source, tensor)
    return TensorStorageMetadata(
        TensorProperties(dtype=getattr(torch, content.dtype)), torch.Size(content.shape), chunks=[]
    )


def _path(name: str) -> tuple[str | int, ...]:
    """Where a value is in the nested dicts that are saved."""
    if name.startswith(STATE):
        weight, _, kind = name.removeprefix(STATE).rpartition(".")
        return ("optimizer", "state", weight, kind)
    if name.startswith(GROUPS):
        index, _, setting = name.removeprefix(GROUPS).partition(".")
        return ("optimizer", "param_groups", int(index), setting)
    if name.startswith(MODEL):
        return ("model", name.removeprefix(MODEL))
    return (name,)
