"""What a writer must know of the state that it saves: computed once, by every rank alone."""

from collections.abc import Sequence

from evermesh.checkpoint.background.orders import ArenaPart, WriterPlan
from evermesh.checkpoint.file_plan import PlannedPart, placed_part, saved_map
from evermesh.checkpoint.format import safetensors_header
from evermesh.checkpoint.retention import Retention
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.stores.places import ObjectPath, Place


def writer_plan(
    shard_map: ShardMap,
    planned: Sequence[PlannedPart],
    rank: int,
    size: int,
    directory: Place,
    retention: Retention,
    incremental: bool,
    parity: int | None = None,
) -> WriterPlan:
    """What the writer of ``rank``, one of ``size``, is told at its start; ``planned`` are the parts that it writes.

    Raises:
        ShardMapInvalid: the map names more ranks than there are, or two parts would have one name in a file.
    """
    safetensors_header([one.entry for one in planned])
    shard_map.check_ranks(size)
    return WriterPlan(
        rank=rank,
        directory=str(directory.absolute()),
        digest=shard_map.digest(),
        parts=tuple(map(_arena_part, planned)),
        retention=retention,
        incremental=incremental and not isinstance(directory, ObjectPath),  # objects have no links
        world_size=size,
        patience_s=directory.patience_s if isinstance(directory, ObjectPath) else None,
        parity=parity,
        saved=saved_map(shard_map) if rank == 0 else None,
    )


def _arena_part(one: PlannedPart) -> ArenaPart:
    entry, placed = one.entry.entry, placed_part(one)
    return ArenaPart(
        placed.name, entry.key, entry.code, entry.shape, entry.num_bytes, placed.region, placed.start, placed.stop
    )
