"""A training state for tests: a function of the step, cut up for any number of ranks."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import JsonValue

from evermesh.checkpoint import (
    Box,
    Interval,
    LoadResult,
    Padding,
    Permutation,
    Region,
    Shard,
    ShardMap,
    StoredForm,
    TensorShards,
    load,
    save,
    wanted_regions,
)
from evermesh.checkpoint.regions import logical_runs
from evermesh.checkpoint.stores.places import ObjectPath, Place
from evermesh.parallelism.collectives import Communicator

PlaceT = TypeVar("PlaceT", Path, ObjectPath, Place)

QKV = Permutation(0, ((0, 0, 8), (16, 8, 4), (24, 12, 4), (8, 16, 8), (20, 24, 4), (28, 28, 4)))
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "model.embed": ("bfloat16", (101, 96)),
    "model.qkv": ("float32", (32, 40)),
    "model.norm": ("float32", (96,)),
    "model.scale": ("float64", ()),
    "model.mask": ("bool", (7, 3)),
    "optimizer.moment": ("float32", (300, 1000)),
}


def logical_state(step: int) -> dict[str, torch.Tensor]:
    """The logical tensors of ``step``; the oracle of every load."""
    generator = torch.Generator().manual_seed(step)
    state = {}
    for name, (dtype, shape) in SHAPES.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        state[name] = (values > 0) if dtype == "bool" else values.to(getattr(torch, dtype))
    return state


def shard_map(world_size: int) -> ShardMap:
    """The state on ``world_size`` ranks: replicated boxes, columns, a fused projection, padded ZeRO intervals."""
    everyone = tuple(range(world_size))

    def replicated(name: str) -> TensorShards:
        dtype, shape = SHAPES[name]
        return TensorShards(dtype, shape, (Shard(Box((0,) * len(shape), shape), everyone),))

    columns = [Box((0, start), (101, stop - start)) for start, stop in _cuts(96, world_size)]
    rows = [Box((start, 0), (stop - start, 40)) for start, stop in _cuts(32, world_size)]
    share = -(-300_000 // world_size)
    intervals = [Interval(rank * share, (rank + 1) * share) for rank in everyone]
    padding = Padding(None, share * world_size - 300_000)
    return ShardMap(
        {
            "model.embed": TensorShards("bfloat16", (101, 96), _one_each(columns)),
            "model.qkv": TensorShards("float32", (32, 40), _one_each(rows), permutation=QKV),
            "model.norm": replicated("model.norm"),
            "model.scale": replicated("model.scale"),
            "model.mask": replicated("model.mask"),
            "optimizer.moment": TensorShards("float32", (300, 1000), _one_each(intervals), padding=padding),
        }
    )


def local_storage(region: Region, form: StoredForm, logical: torch.Tensor) -> torch.Tensor:
    """The storage of one region, padding as zeros."""
    storage = torch.zeros(region.num_elements, dtype=logical.dtype)
    runs = logical_runs(region, form)
    for source, offset, length in zip(runs.source, runs.destination, runs.length, strict=True):
        storage[int(offset) : int(offset + length)] = logical.reshape(-1)[int(source) : int(source + length)]
    return storage.view(region.sizes) if isinstance(region, Box) else storage


def held_by(rank: int, world_size: int, state: Mapping[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """What ``rank`` stores of ``state``."""
    whole = shard_map(world_size)
    return {
        name: [local_storage(region, whole.tensors[name].form, state[name]) for region in regions]
        for name, regions in whole.of_rank(rank).items()
    }


def save_step(
    directory: PlaceT,
    step: int,
    communicator: Communicator | None = None,
    keep: int | None = 2,
    state: int | None = None,
    parity: int | None = None,
) -> PlaceT:
    """Save the state of ``step`` (or of another step, ``state``) on the ranks of ``communicator``."""
    tap = communicator or Communicator()
    held = held_by(tap.rank, tap.size, logical_state(step if state is None else state))
    objects: dict[str, JsonValue] = {"cursor": {"samples": step * 8}, "best": float("inf"), "rng": [2**70, 1]}
    path = save(
        directory,
        step,
        shard_map(tap.size),
        held,
        objects,
        communicator=tap,
        keep=keep,
        description={"model": "test"},
        parity=parity,
    )
    assert isinstance(path, type(directory))
    return path


def load_and_compare(path: Place, step: int, world_size: int) -> list[LoadResult]:
    """Load ``path`` as each of ``world_size`` ranks would, and compare bit for bit with the state of ``step``."""
    results = []
    for rank in range(world_size):
        expected = held_by(rank, world_size, logical_state(step))
        got = {name: [torch.zeros_like(tensor) for tensor in tensors] for name, tensors in expected.items()}
        whole = shard_map(world_size)
        results.append(load(path, wanted_regions(whole, rank, got), shard_map=whole))
        for name, tensors in expected.items():
            for region, tensor, filled in zip(whole.of_rank(rank)[name], tensors, got[name], strict=True):
                assert torch.equal(tensor, filled), (name, region)
    return results


def _cuts(size: int, parts: int) -> list[tuple[int, int]]:
    ends = [size * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(ends))


def _one_each(regions: Sequence[Region]) -> tuple[Shard, ...]:
    return tuple(Shard(region, (rank,)) for rank, region in enumerate(regions))
