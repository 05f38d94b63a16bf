"""The shard map: for each logical tensor, which rank holds which region, listed or by a rule.

Saving, loading, snapshots and re-layout are all the same question: from the regions that exist to the regions that are
wanted. Serialised as JSON (``to_json``/``from_json``): field names as below, tuples as arrays; readers refuse unknown
fields and unknown format versions.
"""

import functools
from dataclasses import dataclass
from typing import Any, Self

import xxhash
from pydantic import TypeAdapter, ValidationError

from evermesh.checkpoint.coverage import check_cover, whole
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import ShardMapInvalid
from evermesh.checkpoint.regions import STRICT, Box, Interval, Padding, Permutation, Region, Runs, StoredForm, intersect
from evermesh.checkpoint.rules import ShardingRule

FORMAT_VERSION = 2


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
    placement: tuple[Shard, ...] | ShardingRule
    """Who holds what: listed, or by a rule, which says it for any number of ranks. In JSON told apart as an array and an
    object."""
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

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Every region with its holders. Of a rule as many as there are ranks: not where there are thousands."""
        if not isinstance(self.placement, ShardingRule):
            return self.placement
        return tuple(Shard(region, ranks) for region, ranks in self.placement.holdings(self.form))

    @property
    def last_rank(self) -> int:
        """The highest rank that it names; -1: none."""
        if isinstance(self.placement, ShardingRule):
            return self.placement.grid.last
        return max((rank for shard in self.placement for rank in shard.ranks), default=-1)

    def of_rank(self, rank: int) -> tuple[Region, ...]:
        """The regions that ``rank`` holds, in the order of the map."""
        if not isinstance(self.placement, ShardingRule):
            return tuple(shard.region for shard in self.placement if rank in shard.ranks)
        coordinates = self.placement.grid.coordinates(rank)
        return () if coordinates is None else self.placement.regions(self.form, coordinates)

    def check(self) -> None:
        """Prove that the regions cover the stored form exactly once, without looking at the ranks of a rule.

        Raises:
            ShardMapInvalid: names the gap, the overlap, the unknown dtype, the shard without ranks, or the wrong cut.
        """
        if self.dtype not in DTYPES:
            raise ShardMapInvalid(f"dtype {self.dtype} cannot be stored. Use one of {', '.join(DTYPES)}.")
        if isinstance(self.placement, ShardingRule):
            self.placement.check(self.form)
            return
        for shard in self.placement:
            if not shard.ranks or len(set(shard.ranks)) != len(shard.ranks) or min(shard.ranks) < 0:
                raise ShardMapInvalid(
                    f"{shard.region} is held by ranks {shard.ranks}. Name at least one, each once, from 0 on."
                )
        check_cover(self.form, tuple(whole(shard.region) for shard in self.placement))


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
                tensor.check()
            except ShardMapInvalid as error:
                raise ShardMapInvalid(f"tensor {name} of shape {tensor.shape}: {error}") from error

    def of_rank(self, rank: int) -> dict[str, tuple[Region, ...]]:
        """The regions that ``rank`` holds, in the order of the map; tensors of which it holds none are left out."""
        held = {name: tensor.of_rank(rank) for name, tensor in self.tensors.items()}
        return {name: regions for name, regions in held.items() if regions}

    def check_ranks(self, size: int) -> None:
        """Raise ``ShardMapInvalid`` if the map names a rank that ``size`` ranks do not have."""
        last = max((tensor.last_rank for tensor in self.tensors.values()), default=-1)
        if last >= size:
            raise ShardMapInvalid(f"the shard map names rank {last}, but {size} ranks save.")

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
    "ShardingRule",
    "StoredForm",
    "TensorShards",
    "intersect",
]
