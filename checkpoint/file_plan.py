"""What one rank writes, in the order of its file; computed by the rank alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter

from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.encoding import PlacedPart
from evermesh.checkpoint.format import FilePart
from evermesh.checkpoint.merging import SavedMap
from evermesh.checkpoint.regions import Region
from evermesh.checkpoint.shard_map import Shard, ShardMap, TensorShards
from evermesh.checkpoint.write_plan import WritePart, WritePlan

_REGION: TypeAdapter[Region] = TypeAdapter(Region)
_TENSORS = TypeAdapter(dict[str, TensorShards])


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """One entry of a file, and where its elements come from."""

    part: WritePart
    entry: FilePart


def planned_parts(shard_map: ShardMap, rank: int, within: Sequence[int] | None = None) -> list[PlannedPart]:
    """The parts that ``rank`` writes, larger elements first: every entry is then aligned to its own element size.

    With ``within``, ranks that include it, everything that any of these holds is written once among them.
    """
    assigned = WritePlan(shard_map).of_rank(rank) if within is None else parts_within(shard_map, rank, within)
    ordered = sorted(assigned, key=lambda part: -DTYPES[shard_map.tensors[part.name].dtype].num_bytes)
    return [_planned(shard_map, part) for part in ordered]


def parts_within(shard_map: ShardMap, rank: int, within: Sequence[int]) -> list[WritePart]:
    """What ``rank`` writes if all that the ranks ``within`` hold is to be written once among them."""
    held = {one: shard_map.of_rank(one) for one in within}
    tensors: dict[str, TensorShards] = {}
    for name, tensor in shard_map.tensors.items():
        holders: dict[Region, list[int]] = {}
        for one in within:
            for region in held[one].get(name, ()):
                holders.setdefault(region, []).append(one)
        shards = tuple(Shard(region, tuple(ranks)) for region, ranks in holders.items())
        tensors[name] = replace(tensor, placement=shards)
    found = WritePlan(ShardMap(tensors)).of_rank(rank)
    return [replace(part, held=held[rank][part.name].index(part.region)) for part in found]


def _planned(shard_map: ShardMap, part: WritePart) -> PlannedPart:
    tensor = shard_map.tensors[part.name]
    return PlannedPart(part, FilePart(part.name, tensor.dtype, part.region, part.start, part.stop, tensor.form))


def placed_part(one: PlannedPart) -> PlacedPart:
    """A part as an index tells of it."""
    region: dict[str, Any] = _REGION.dump_python(one.part.region, mode="json")
    return PlacedPart(one.part.name, region, one.part.start, one.part.stop, one.entry.num_bytes)


def saved_map(shard_map: ShardMap) -> SavedMap:
    """What rank 0 must know of a map to write the manifest."""
    tensors = _TENSORS.dump_python(shard_map.tensors, mode="json")
    return SavedMap(shard_map.digest(), shard_map.num_bytes, tensors)
