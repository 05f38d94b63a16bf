"""The snapshots of a node as a checkpoint: the files are where the ranks have copied them to, and nothing else is new.

What the ranks of a node hold is divided among them, so that its memory has all that they need; and a rank of another layout
finds what it wants there as in any checkpoint.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash
from pydantic import JsonValue

from evermesh.checkpoint.encoding import index_head
from evermesh.checkpoint.errors import CheckpointCorrupt
from evermesh.checkpoint.format import Extent, RankFiles, RankIndex, StoredFile, StoredTensor
from evermesh.checkpoint.indexed import index_of
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.sources import Source
from evermesh.fault.snapshot.choosing import Version
from evermesh.fault.snapshot.keeper.slots import Held, SlotFiles, held_by


def versions_of(area: Path, rank: int) -> list[Version]:
    """The snapshots of which the slots of ``rank`` hold its part."""
    return [_version(held) for held in held_by(area, rank)]


def slot_with(area: Path, rank: int, version: Version) -> int:
    """The slot of ``rank`` that holds its part of a snapshot. Raises ``CheckpointCorrupt``."""
    found = next((held for held in held_by(area, rank) if _version(held) == version), None)
    if found is None:
        raise CheckpointCorrupt(area, f"rank {rank} no longer holds step {version.step}")
    return found.number


def source_of_node(area: Path, ranks: Sequence[int], version: Version, shard_map: ShardMap, world_size: int) -> Source:
    """A snapshot as the memory of the node with ``ranks`` holds it; indexes are read and verified, tensors are not.

    ``shard_map`` is the one that ``version`` names.

    Raises:
        CheckpointCorrupt: an index or the objects are not what was sealed.
    """
    files: dict[str, StoredFile] = {}
    extents: dict[str, list[Extent]] = {name: [] for name in shard_map.tensors}
    for rank in ranks:
        held = next((one for one in held_by(area, rank) if _version(one) == version), None)
        if held is None:
            raise CheckpointCorrupt(area, f"rank {rank} no longer holds step {version.step}")
        index, slot = _index(area, held), SlotFiles.of(area, rank, held.number)
        place = slot.folder.relative_to(area).as_posix()
        for name, checksums in index.checksums.items():
            files[f"{place}/{name}"] = StoredFile(held.record.data_bytes, checksums)
        for name, of_tensor in index.extents.items():
            extents[name] += [replace(extent, file=f"{place}/{extent.file}") for extent in of_tensor]
    said = objects_of(area, ranks[0], version)
    return Source(
        area,
        "evermesh",
        {
            name: StoredTensor(t.dtype, t.shape, tuple(extents[name]), t.permutation, t.padding)
            for name, t in shard_map.tensors.items()
        },
        files,
        said["objects"],
        said["description"],
        version.step,
        world_size,
        is_foreign=False,
    )


def objects_of(area: Path, rank: int, version: Version) -> Mapping[str, Any]:
    """What a rank said besides tensors: ``objects`` and ``description``. Raises ``CheckpointCorrupt``."""
    files = SlotFiles.of(area, rank, slot_with(area, rank, version))
    try:
        payload, line = files.objects.read_bytes(), files.index.open("rb").readline()
        if xxhash.xxh3_64_hexdigest(payload) != index_head(line).told["objects"]:
            raise CheckpointCorrupt(files.objects, "the checksum is wrong")
        said: dict[str, dict[str, JsonValue]] = json.loads(payload)
    except (OSError, LookupError, ValueError) as error:
        if isinstance(error, CheckpointCorrupt):
            raise
        raise CheckpointCorrupt(files.objects, f"it is not what was sealed: {error}") from error
    return said


def _version(held: Held) -> Version:
    return Version(held.record.generation, held.record.step, held.record.shard_map)


def _index(area: Path, held: Held) -> RankIndex:
    files, record = SlotFiles.of(area, held.record.rank, held.number), held.record
    data = {files.data.name: record.data_bytes} if record.data_bytes else {}
    return index_of(files.index, RankFiles(record.root, record.index_bytes, data))
