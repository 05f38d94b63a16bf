"""Which snapshot a job goes on from: a pure function of what the ranks hold."""

from collections.abc import Collection, Mapping
from typing import NamedTuple


class Version(NamedTuple):
    """One snapshot of a job. Later ones compare as greater: what an attempt made is newer than what one before it made."""

    generation: int
    """Of the attempt that made it."""
    step: int
    shard_map: str
    """Digest of the map by which ranks held the state."""


def common_versions(held: Mapping[int, Collection[Version]], world_size: int) -> list[Version]:
    """The snapshots of which each of ``world_size`` ranks holds its part, newest first.

    One that some rank has not is none: parts of two steps, or of one step of two attempts, are never mixed.
    """
    found = [set(held.get(rank, ())) for rank in range(world_size)]
    return sorted(set.intersection(*found), reverse=True) if found else []
