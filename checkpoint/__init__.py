"""Shard maps, the universal checkpoint format, saving, loading and the registry of all state."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evermesh.checkpoint.background.saver import BackgroundSaver
    from evermesh.checkpoint.directory import CheckpointInfo, checkpoints, latest
    from evermesh.checkpoint.errors import (
        CheckpointCorrupt,
        CheckpointMismatch,
        CheckpointNotFound,
        CheckpointNotSaved,
        ForeignUnusable,
        HostMemoryShort,
        ParityUnusable,
        RegistryMismatch,
        ShardMapInvalid,
        StoreRefused,
        StoreUnusable,
    )
    from evermesh.checkpoint.loading import LoadResult, load, wanted_regions
    from evermesh.checkpoint.opening import open_checkpoint
    from evermesh.checkpoint.pruning import Pruning, prune
    from evermesh.checkpoint.registry import PerRank, Replicated, Sharded, StateDescription, StateRegistry
    from evermesh.checkpoint.repairing import RepairReport, repair
    from evermesh.checkpoint.retention import Retention
    from evermesh.checkpoint.rules import DimCut, FlatCut, RankGrid, ShardingRule
    from evermesh.checkpoint.saving import save
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

_MODULES = {
    "background.saver": ("BackgroundSaver",),
    "directory": ("CheckpointInfo", "checkpoints", "latest"),
    "errors": (
        "CheckpointCorrupt",
        "CheckpointMismatch",
        "CheckpointNotFound",
        "CheckpointNotSaved",
        "ForeignUnusable",
        "HostMemoryShort",
        "ParityUnusable",
        "RegistryMismatch",
        "ShardMapInvalid",
        "StoreRefused",
        "StoreUnusable",
    ),
    "loading": ("LoadResult", "load", "wanted_regions"),
    "opening": ("open_checkpoint",),
    "pruning": ("Pruning", "prune"),
    "registry": ("PerRank", "Replicated", "Sharded", "StateDescription", "StateRegistry"),
    "repairing": ("RepairReport", "repair"),
    "retention": ("Retention",),
    "rules": ("DimCut", "FlatCut", "RankGrid", "ShardingRule"),
    "saving": ("save",),
    "shard_map": (
        "Box",
        "Interval",
        "Padding",
        "Permutation",
        "Region",
        "Shard",
        "ShardMap",
        "StoredForm",
        "TensorShards",
        "intersect",
    ),
    "sources": ("Source",),
    "verifying": ("Problem", "VerifyReport", "describe", "verify"),
}
"""Imported when a name is first used: torch for some, and nothing but xxhash for the process that writes."""
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BackgroundSaver",
    "Box",
    "CheckpointCorrupt",
    "CheckpointInfo",
    "CheckpointMismatch",
    "CheckpointNotFound",
    "CheckpointNotSaved",
    "DimCut",
    "FlatCut",
    "ForeignUnusable",
    "HostMemoryShort",
    "Interval",
    "LoadResult",
    "Padding",
    "ParityUnusable",
    "PerRank",
    "Permutation",
    "Problem",
    "Pruning",
    "RankGrid",
    "Region",
    "RegistryMismatch",
    "RepairReport",
    "Replicated",
    "Retention",
    "Shard",
    "ShardMap",
    "ShardMapInvalid",
    "Sharded",
    "ShardingRule",
    "Source",
    "StateDescription",
    "StateRegistry",
    "StoreRefused",
    "StoreUnusable",
    "StoredForm",
    "TensorShards",
    "VerifyReport",
    "checkpoints",
    "describe",
    "intersect",
    "latest",
    "load",
    "open_checkpoint",
    "prune",
    "repair",
    "save",
    "verify",
    "wanted_regions",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
