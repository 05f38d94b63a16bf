"""Which snapshot a job goes on from: a pure function of what the ranks hold."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from evermesh.fault.snapshot.keeper.layouts import Group


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


def complete_versions(
    held: Mapping[Version, Collection[int]],
    groups: Iterable[Group],
    covers: Callable[[Version, frozenset[int]], bool],
) -> list[Version]:
    """The snapshots that can be put together from parts in the memory of any nodes, newest first.

    Args:
        held: by snapshot the ranks whose parts can be reached, wherever they are.
        groups: ranks that share the writing of what they hold, so that the parts of all of them are needed.
        covers: whether what these ranks held by the map of a snapshot is everything; asked where ranks are missing,
            because others may hold the same.
    """
    together: dict[tuple[int, str], set[Group]] = {}
    for group in groups:
        together.setdefault((group.generation, group.shard_map), set()).add(group)
    found = []
    for version in sorted(held, reverse=True):
        whole = {
            group
            for group in together.get((version.generation, version.shard_map), ())
            if set(group.ranks) <= set(held[version])
        }
        ranks = frozenset(rank for group in whole for rank in group.ranks)
        is_all = any(len(ranks) == group.world_size for group in whole)
        if whole and (is_all or covers(version, ranks)):
            found.append(version)
    return found
