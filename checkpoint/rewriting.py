"""Writes a source of any format as a step of ours, by one process, streamed."""

from collections.abc import Mapping
from typing import Any, cast

from pydantic import JsonValue

from evermesh.checkpoint.contents import Tell
from evermesh.checkpoint.lazy import Streamed
from evermesh.checkpoint.regions import Box
from evermesh.checkpoint.saving import save
from evermesh.checkpoint.shard_map import Shard, ShardMap, TensorShards
from evermesh.checkpoint.sources import Source, find
from evermesh.checkpoint.stores.places import Place


def rewrite(
    source: Source,
    directory: Place,
    step: int,
    objects: Mapping[str, JsonValue],
    description: Mapping[str, JsonValue],
    tell: Tell | None = None,
) -> Place:
    """Write all tensors of ``source`` below ``directory`` as a step of one rank, which any number of ranks loads; returns its
    path. Not collective. No more than 16 MiB of a tensor are in memory.

    Raises:
        CheckpointNotSaved: it could not be read or written; nothing is visible.
    """
    tensors = {
        name: TensorShards(tensor.dtype, tensor.shape, (Shard(Box((0,) * len(tensor.shape), tensor.shape), (0,)),))
        for name, tensor in source.tensors.items()
    }
    found, _ = find(source, None)
    streamed = {name: [Streamed(source, found, name, tell)] for name in tensors}
    return save(
        directory,
        step,
        ShardMap(tensors),
        cast(Any, streamed),  # not tensors, but what a save needs of one
        objects,
        keep=None,
        description=description,
    )
