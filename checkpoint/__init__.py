"""Shard maps, the universal checkpoint format, saving, loading and the registry of all state."""

from typing import TYPE_CHECKING, Any

from evermesh.checkpoint.directory import CheckpointInfo, checkpoints, latest
from evermesh.checkpoint.errors import (
    CheckpointCorrupt,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointNotSaved,
    ForeignUnusable,
    RegistryMismatch,
    ShardMapInvalid,
)
from evermesh.checkpoint.opening import open_checkpoint
from evermesh.checkpoint.registry import PerRank, Replicated, Sharded, StateDescription, StateRegistry
from evermesh.checkpoint.shard_map import (
    Box,
    Interval,
    Padding,
    Permutation,
    Region,
    Shard,
    ShardMap,
    StoredForm,
    TensorShards,
    intersect,
)
from evermesh.checkpoint.sources import Source
from evermesh.checkpoint.verifying import Problem, VerifyReport, describe, verify

if TYPE_CHECKING:
    from evermesh.checkpoint.loading import LoadResult, load, wanted_regions
    from evermesh.checkpoint.saving import save

_NEED_TORCH = {
    "LoadResult": "loading",
    "load": "loading",
    "save": "saving",
    "wanted_regions": "loading",
}

__all__ = [
    "Box",
    "CheckpointCorrupt",
    "CheckpointInfo",
    "CheckpointMismatch",
    "CheckpointNotFound",
    "CheckpointNotSaved",
    "ForeignUnusable",
    "Interval",
    "LoadResult",
    "Padding",
    "PerRank",
    "Permutation",
    "Problem",
    "Region",
    "RegistryMismatch",
    "Replicated",
    "Shard",
    "ShardMap",
    "ShardMapInvalid",
    "Sharded",
    "Source",
    "StateDescription",
    "StateRegistry",
    "StoredForm",
    "TensorShards",
    "VerifyReport",
    "checkpoints",
    "describe",
    "intersect",
    "latest",
    "load",
    "open_checkpoint",
    "save",
    "verify",
    "wanted_regions",
]


def __getattr__(name: str) -> Any:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_NEED_TORCH[name]}"), name)
    globals()[name] = value
    return value
