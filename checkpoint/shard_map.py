"""The shard map: for each logical tensor, which rank holds which region.

Saving, loading, snapshots and re-layout are all the same question: from the regions that exist to the regions that are
wanted. Serialised as JSON (``to_json``/``from_json``): field names as below, tuples as arrays; readers refuse unknown
fields and unknown format versions.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any, Self

import xxhash
from pydantic import TypeAdapter, ValidationError

from evermesh.checkpoint.balance import quotas
from evermesh.checkpoint.coverage import check_cover, whole
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import ShardMapInvalid
from evermesh.checkpoint.regions import STRICT, Box, Interval, Padding, Permutation, Region, Runs, StoredForm, intersect

FORMAT_VERSION = 1
LEAST_PART_BYTES = 1 << 16
"""A replicated group is divided among so many holders that each writes at least this much."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A region and everyone who holds it."""

    __pydantic_config__ = STRICT

    region: Region
    """In the stored form of the tensor."""
    ranks: tuple[int, ...]
    """The replica holders, ascending."""


@dataclass(frozen=True, slots=True)
class TensorShards:
    """One logical tensor and where it is."""

    __pydantic_config__ = STRICT

    dtype: str
    """Name of the torch dtype, such as ``bfloat16``."""
    shape: tuple[int, ...]
    """Shape of the logical tensor."""
    shards: tuple[Shard, ...]
    permutation: Permutation | None = None
    padding: Padding | None = None

    @property
    def form(self) -> StoredForm:
        """The form that the regions refer to."""
        return StoredForm(self.shape, self.permutation, self.padding)

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored form, padding included, replicas not."""
        return self.form.num_elements * DTYPES[self.dtype].num_bytes


@dataclass(frozen=True, slots=True)
class WritePart:
    """What one rank writes of one shard."""

    name: str
    """Name of the tensor."""
    shard: int
    """Index of the shard in its tensor."""
    start: int
    """First element of the region's row-major storage."""
    stop: int


@dataclass(frozen=True, slots=True)
class ShardMap:
    """All tensors of a training state. Equal on every rank."""

    __pydantic_config__ = STRICT

    tensors: dict[str, TensorShards]
    format_version: int = FORMAT_VERSION

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, each region once."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    def check(self) -> None:
        """Prove that the regions of every tensor cover its stored form exactly once.

        Raises:
            ShardMapInvalid: names the tensor and the gap, the overlap, the unknown dtype or the shard without ranks.
        """
        for name, tensor in self.tensors.items():
            try:
                _check_entry(tensor)
                check_cover(tensor.form, tuple(whole(shard.region) for shard in tensor.shards))
            except ShardMapInvalid as error:
                raise ShardMapInvalid(f"tensor {name} of shape {tensor.shape}: {error}") from error

    def of_rank(self, rank: int) -> dict[str, tuple[Region, ...]]:
        """The regions that ``rank`` holds, in the order of the map; tensors of which it holds none are left out."""
        held = {
            name: tuple(shard.region for shard in tensor.shards if rank in shard.ranks)
            for name, tensor in self.tensors.items()
        }
        return {name: regions for name, regions in held.items() if regions}

    def writers(self, least_part_bytes: int = LEAST_PART_BYTES) -> dict[int, tuple[WritePart, ...]]:
        """Who writes what: every element once, and the bytes of the busiest rank as few as its replicas allow.

        Regions that the same ranks hold are laid end to end and cut once per rank, so that a rank writes few parts.
        Groups with fewer holders are divided first. Every rank computes the same division from the map alone.
        """
        loads: dict[int, int] = {rank: 0 for t in self.tensors.values() for s in t.shards for rank in s.ranks}
        parts: dict[int, list[WritePart]] = {rank: [] for rank in sorted(loads)}
        for ranks, shards in sorted(self._groups().items(), key=lambda group: (len(group[0]), group[0])):
            num_bytes = sum(num_elements * item for _, _, num_elements, item in shards)
            shares = quotas([loads[rank] for rank in ranks], num_bytes, least_part_bytes)
            for rank, share in zip(ranks, shares, strict=True):
                loads[rank] += share
            for at, part in _cut(shards, shares):
                parts[ranks[at]].append(part)
        return {rank: tuple(of_rank) for rank, of_rank in parts.items() if of_rank}

    def _groups(self) -> dict[tuple[int, ...], list[tuple[str, int, int, int]]]:
        """By holders: (tensor, shard, elements, bytes of one) of every shard that is not empty, ordered by name."""
        groups: dict[tuple[int, ...], list[tuple[str, int, int, int]]] = {}
        for name, tensor in sorted(self.tensors.items()):
            for index, shard in enumerate(tensor.shards):
                if shard.region.num_elements:
                    entry = (name, index, shard.region.num_elements, DTYPES[tensor.dtype].num_bytes)
                    groups.setdefault(tuple(sorted(shard.ranks)), []).append(entry)
        return groups

    def digest(self) -> str:
        """Digest of the map, by which ranks make sure that they save the same one; the order of names is no part."""
        ordered = ShardMap(dict(sorted(self.tensors.items())), self.format_version)
        return xxhash.xxh3_128_hexdigest(ordered.to_json())

    def to_json(self) -> bytes:
        """The map as JSON."""
        return _adapter().dump_json(self)

    @classmethod
    def from_json(cls, payload: bytes | str) -> Self:
        """The map that ``to_json`` wrote.

        Raises:
            ShardMapInvalid: the payload is not a shard map of this format version.
        """
        try:
            shard_map = _adapter().validate_json(payload)
        except ValidationError as error:
            raise ShardMapInvalid(
                f"not a shard map: {error.error_count()} errors, first: {error.errors()[0]}"
            ) from error
        if shard_map.format_version != FORMAT_VERSION:
            raise ShardMapInvalid(
                f"shard map of format {shard_map.format_version}; this version reads {FORMAT_VERSION}."
            )
        return shard_map


def _check_entry(tensor: TensorShards) -> None:
    if tensor.dtype not in DTYPES:
        raise ShardMapInvalid(f"dtype {tensor.dtype} cannot be stored. Use one of {', '.join(DTYPES)}.")
    for shard in tensor.shards:
        if not shard.ranks or len(set(shard.ranks)) != len(shard.ranks):
            raise ShardMapInvalid(f"{shard.region} is held by ranks {shard.ranks}. Name at least one, and each once.")


def _cut(shards: list[tuple[str, int, int, int]], shares: list[int]) -> list[tuple[int, WritePart]]:
    """Cut shards laid end to end at the sums of ``shares`` (bytes), rounded down to whole elements."""
    ends = list(itertools.accumulate(shares))
    last = max(at for at, share in enumerate(shares) if share)
    cuts: list[tuple[int, WritePart]] = []
    begin, at = 0, 0
    for name, index, num_elements, item in shards:
        start = 0
        while start < num_elements:
            stop = num_elements if at == last else min(num_elements, (ends[at] - begin) // item)
            if stop > start:
                cuts.append((at, WritePart(name, index, start, stop)))
                start = stop
            if start < num_elements:
                at += 1
        begin += num_elements * item
    return cuts


@functools.cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(ShardMap)


__all__ = [
    "FORMAT_VERSION",
    "Box",
    "Interval",
    "Padding",
    "Permutation",
    "Region",
    "Runs",
    "Shard",
    "ShardMap",
    "StoredForm",
    "TensorShards",
    "WritePart",
    "intersect",
]
