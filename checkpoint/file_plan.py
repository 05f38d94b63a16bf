"""What one rank writes, in the order of its file; computed by the rank alone."""

from dataclasses import dataclass

from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.format import FilePart
from evermesh.checkpoint.shard_map import ShardMap, WritePart


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """One entry of a file, and where its elements come from."""

    part: WritePart
    entry: FilePart
    held: int
    """Which of the regions that the rank holds of the tensor."""


def planned_parts(shard_map: ShardMap, rank: int) -> list[PlannedPart]:
    """The parts that ``rank`` writes, larger elements first: every entry is then aligned to its own element size."""
    assigned = shard_map.writers().get(rank, ())
    ordered = sorted(assigned, key=lambda part: -DTYPES[shard_map.tensors[part.name].dtype].num_bytes)
    return [_planned(shard_map, part, rank) for part in ordered]


def _planned(shard_map: ShardMap, part: WritePart, rank: int) -> PlannedPart:
    tensor = shard_map.tensors[part.name]
    entry = FilePart(part.name, tensor.dtype, tensor.shards[part.shard].region, part.start, part.stop, tensor.form)
    return PlannedPart(part, entry, sum(rank in shard.ranks for shard in tensor.shards[: part.shard]))
