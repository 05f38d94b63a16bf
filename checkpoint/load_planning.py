"""What loading a checkpoint into a layout would read, rank by rank, from the index alone: no tensor is read or made."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import CheckpointMismatch
from evermesh.checkpoint.files import CHUNK_BYTES
from evermesh.checkpoint.filling import Known, pieces
from evermesh.checkpoint.format import StoredFile
from evermesh.checkpoint.naming import Naming
from evermesh.checkpoint.regions import IntArray, Interval, Region, StoredForm
from evermesh.checkpoint.shard_map import Shard, ShardMap, TensorShards
from evermesh.checkpoint.sources import Found, Source, find


@dataclass(frozen=True, slots=True)
class RankReads:
    """What one rank would read."""

    rank: int
    bytes_needed: int
    """Of its regions, padding not counted."""
    bytes_read: int
    """From files of tensors: whole chunks of 1 MiB where the format has checksums."""
    files: tuple[str, ...]
    runs: int
    """Stretches of files, one call each: those that follow each other count once."""


def plan_load(
    source: Source, shard_map: ShardMap, ranks: Iterable[int], *, names: Naming | None = None
) -> Iterator[RankReads]:
    """What each of ``ranks`` would read to fill its regions of ``shard_map`` from ``source``. Not collective.

    Numbers are those that ``load`` would count, without reading anything but indexes.

    Raises:
        CheckpointMismatch: tensors of the map are not there, or have other shapes.
    """
    found, misfits = find(source, names)
    lacking = [f"missing in the checkpoint: {name}" for name in shard_map.tensors if name not in found]
    others = [
        f"{name} is {list(found[name].shape)} there, {list(tensor.shape)} is wanted"
        for name, tensor in shard_map.tensors.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if misfits or lacking or others:
        raise CheckpointMismatch(source.path, [*misfits, *lacking, *others])
    for rank in ranks:
        yield reads_of_rank(source, shard_map, found, rank)


def even_map(source: Source, ranks: int, kinds: tuple[str, ...] = ()) -> ShardMap:
    """Every tensor in equal flat intervals, as ranks of fully sharded data parallelism hold them; ``kinds`` are what
    names begin with, none: all."""
    tensors = {}
    for name, tensor in source.tensors.items():
        if kinds and not name.startswith(kinds):
            continue
        size = StoredForm(tensor.shape).num_elements
        edges = [size * rank // ranks for rank in range(ranks + 1)]
        regions = (Interval(start, stop) for start, stop in itertools.pairwise(edges))
        shards = tuple(Shard(region, (rank,)) for rank, region in enumerate(regions))
        tensors[name] = TensorShards(tensor.dtype, tensor.shape, shards)
    return ShardMap(tensors)


def reads_of_rank(source: Source, shard_map: ShardMap, found: Mapping[str, Found], rank: int) -> RankReads:
    """What one rank would read, whose tensors are known to be there."""
    runs: dict[str, list[tuple[IntArray, IntArray]]] = {}
    needed, known = 0, Known()
    for name, regions in shard_map.of_rank(rank).items():
        item, form = DTYPES[found[name].dtype].num_bytes, shard_map.tensors[name].form
        for file, position, length in _runs(source, found[name], form, regions, item, known):
            runs.setdefault(file, []).append((position, length))
            needed += int(length.sum())
    counts = {file: _count(source, file, of_file) for file, of_file in runs.items()}
    bytes_read, calls = (sum(count[side] for count in counts.values()) for side in (0, 1))
    return RankReads(rank, needed, bytes_read, tuple(sorted(runs)), calls)


def _runs(
    source: Source, found: Found, form: StoredForm, regions: Iterable[Region], item: int, known: Known
) -> Iterator[tuple[str, IntArray, IntArray]]:
    """Positions and lengths in files, bytes."""
    for region in regions:
        for _, extent, runs in pieces(source, found, form, region, known):
            yield extent.file, extent.offset + runs.source * item, runs.length * item


def _count(source: Source, file: str, runs: list[tuple[IntArray, IntArray]]) -> tuple[int, int]:
    """Bytes that are read from a file, and in how many stretches."""
    begin = np.concatenate([position for position, _ in runs])
    end = begin + np.concatenate([length for _, length in runs])
    stored = source.files[file]
    if isinstance(stored, StoredFile):
        first, last = begin // CHUNK_BYTES, -(-end // CHUNK_BYTES)
        begin, end = first * CHUNK_BYTES, np.minimum(last * CHUNK_BYTES, stored.num_bytes)
    order = np.argsort(begin, kind="stable")
    begin, end = begin[order], np.maximum.accumulate(end[order])
    starts = np.concatenate([[True], begin[1:] > end[:-1]])
    heads = np.flatnonzero(starts)
    tails = np.concatenate([heads[1:] - 1, [len(begin) - 1]])
    return int((end[tails] - begin[heads]).sum()), len(heads)
