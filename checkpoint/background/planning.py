"""What a writer must know of the state that it saves: computed once, by every rank alone."""

from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from evermesh.checkpoint.background.orders import ArenaPart, WriterPlan
from evermesh.checkpoint.errors import ShardMapInvalid
from evermesh.checkpoint.file_plan import PlannedPart
from evermesh.checkpoint.format import safetensors_header
from evermesh.checkpoint.regions import Region
from evermesh.checkpoint.retention import Retention
from evermesh.checkpoint.shard_map import ShardMap, TensorShards
from evermesh.checkpoint.stores.places import ObjectPath, Place

_REGION: TypeAdapter[Region] = TypeAdapter(Region)
_SHARDS = TypeAdapter(TensorShards)


def writer_plan(
    shard_map: ShardMap,
    planned: Sequence[PlannedPart],
    rank: int,
    size: int,
    directory: Place,
    retention: Retention,
    incremental: bool,
) -> WriterPlan:
    """What the writer of ``rank``, one of ``size``, is told at its start; ``planned`` are the parts that it writes.

    Raises:
        ShardMapInvalid: the map names more ranks than there are, or two parts would have one name in a file.
    """
    safetensors_header([one.entry for one in planned])
    writers = tuple(shard_map.writers())
    if max(writers, default=0) >= size:
        raise ShardMapInvalid(f"the shard map names rank {max(writers)}, but {size} ranks save.")
    return WriterPlan(
        rank=rank,
        directory=str(directory.absolute()),
        digest=shard_map.digest(),
        writers=writers,
        parts=tuple(_arena_part(one) for one in planned),
        retention=retention,
        incremental=incremental and not isinstance(directory, ObjectPath),  # objects have no links
        patience_s=directory.patience_s if isinstance(directory, ObjectPath) else None,
        world_size=size,
        tensors=_without_extents(shard_map) if rank == 0 else None,
        num_elements=_num_elements(shard_map) if rank == 0 else None,
    )


def _arena_part(one: PlannedPart) -> ArenaPart:
    entry = one.entry.entry
    region: dict[str, Any] = _REGION.dump_python(one.entry.region, mode="json")
    return ArenaPart(
        one.part.name, entry.key, entry.code, entry.shape, entry.num_bytes, region, one.part.start, one.part.stop
    )


def _without_extents(shard_map: ShardMap) -> dict[str, dict[str, Any]]:
    fields = ("dtype", "shape", "permutation", "padding")
    values = {name: _SHARDS.dump_python(tensor, mode="json") for name, tensor in shard_map.tensors.items()}
    return {name: {field: entry[field] for field in fields} for name, entry in values.items()}


def _num_elements(shard_map: ShardMap) -> dict[str, int]:
    return {name: tensor.form.num_elements for name, tensor in shard_map.tensors.items()}
