"""Which ranks of which layout a keeper has snapshots of: what a rank of any other layout must know to read them.

AREA/layouts/GENERATION-DIGEST-FIRST-RANK    one line each: xxh3-64 of the rest, ranks and size of the world, the shard map

The first rank of a node writes it once, before the first snapshot of a layout.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import xxhash

_FOLDER = "layouts"


class Group(NamedTuple):
    """The ranks of a node that have left a snapshot together: all that any of them holds is there once."""

    generation: int
    """Of the attempt."""
    shard_map: str
    """Digest of the map by which the ranks of the attempt held the state."""
    ranks: tuple[int, ...]
    world_size: int
    """Ranks on all nodes."""

    @classmethod
    def from_values(cls, values: Sequence[Any]) -> Self:
        """The group that JSON has made an array of. Raises ``ValueError`` or ``TypeError`` if it is none."""
        generation, shard_map, ranks, world_size = values
        return cls(int(generation), str(shard_map), tuple(int(rank) for rank in ranks), int(world_size))


def layout_file(area: Path, generation: int, shard_map: str, first_rank: int) -> Path:
    """Where a layout is written."""
    return area / _FOLDER / f"{generation}-{shard_map}-{first_rank}"


def write_layout(area: Path, group: Group, shard_map: bytes) -> None:
    """Write down a group and its map (JSON), if that is not there yet. Raises ``OSError`` if there is no room."""
    path = layout_file(area, group.generation, group.shard_map, group.ranks[0])
    told = json.dumps({"ranks": group.ranks, "world_size": group.world_size}, separators=(",", ":")).encode()
    rest = told + b"\n" + shard_map
    content = xxhash.xxh3_64_hexdigest(rest).encode() + b"\n" + rest
    if path.is_file() and path.stat().st_size == len(content):
        return
    path.parent.mkdir(mode=0o700, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(content)
    new.rename(path)


def opened_layout(content: bytes) -> tuple[tuple[int, ...], int, bytes]:
    """Ranks, size of the world and shard map (JSON) of what ``write_layout`` wrote. Raises ``ValueError`` if it is not."""
    digest, _, rest = content.partition(b"\n")
    if xxhash.xxh3_64_hexdigest(rest).encode() != digest:
        raise ValueError("it is not what was written")
    line, _, shard_map = rest.partition(b"\n")
    told = json.loads(line)
    return tuple(told["ranks"]), told["world_size"], shard_map


def groups_in(area: Path) -> list[Group]:
    """The groups that are written down in an area; what is damaged is left out."""
    found = []
    for path in sorted(area.glob(f"{_FOLDER}/*-*-*")):
        try:
            generation, shard_map, _ = path.name.split("-")
            ranks, world_size, _ = opened_layout(path.read_bytes())
            found.append(Group(int(generation), shard_map, ranks, world_size))
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return found


def forget_layouts(area: Path, wanted: Collection[tuple[int, str]]) -> None:
    """Remove all but those of these generations and digests."""
    for path in area.glob(f"{_FOLDER}/*-*-*"):
        generation, shard_map, _ = path.name.split("-")
        if (int(generation), shard_map) not in wanted:
            path.unlink(missing_ok=True)
