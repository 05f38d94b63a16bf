"""Which snapshot a job can go on from when some of its nodes have lost their memory: pure functions of what agents tell."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from evermesh.fault.snapshot.choosing import Version
from evermesh.launcher.messages import InMemory, ProtectedPart


class Group(NamedTuple):
    """Nodes, by their places in an attempt, that protect each other's snapshots. It stays as it is while nodes change."""

    number: int
    places: tuple[int, ...]
    """By rank in the stripe."""
    code: str | None
    """As data + parity parts; None: nobody protects anybody."""

    @property
    def name(self) -> str:
        """What keepers call it."""
        return f"stripe-{self.number}"

    @property
    def tolerated(self) -> int:
        """Nodes that may be lost."""
        return 0 if self.code is None else int(self.code.partition("+")[2])


class Recovery(NamedTuple):
    """A snapshot that all nodes hold, or can hold again."""

    version: Version
    rebuild: Mapping[int, ProtectedPart]
    """By number of the groups in which somebody lacks his part: what those know who can help."""


@lru_cache
def groups_of(nodes: int, code: str) -> tuple[Group, ...]:
    """The stripes of the ``nodes`` places of an attempt; ``code`` is ``train.snapshot.code``.

    Places keep their groups whichever nodes take them: what one lost is rebuilt by those it protected before.
    """
    most_parity = int(code.partition("+")[2] or 0)
    if nodes <= max(1, most_parity) or code == "none":
        return (Group(0, tuple(range(nodes)), None),)
    # only now: it loads numpy, which a controller of one node does without
    from evermesh.fault.snapshot.coding import Code
    from evermesh.fault.snapshot.stripes.placement import Candidate, plan_stripes

    given = "auto" if code == "auto" else Code.parse(code)
    plan = plan_stripes([Candidate(str(place)) for place in range(nodes)], given)  # type: ignore[arg-type]
    return tuple(
        Group(number, tuple(int(node) for node in stripe.nodes if node is not None), str(stripe.code))
        for number, stripe in enumerate(plan.stripes)
    )


def find_recovery(
    groups: Sequence[Group],
    memories: Sequence[InMemory | None],
    ranks_per_node: int,
    unwanted: Collection[Version] = (),
) -> Recovery | None:
    """The newest snapshot that every node holds or that its group can rebuild; None: there is none.

    Args:
        memories: by place: what the node there holds, None where nothing is known.
        unwanted: snapshots that were tried in vain.
    """
    held = _all_held(memories, ranks_per_node)
    known = {
        (group.number, member): _protected(memories[place], group, member)
        for group in groups
        for member, place in enumerate(group.places)
    }
    candidates = {version for of_node in held for version in of_node} - set(unwanted)
    for version in sorted(candidates, reverse=True):
        rebuild = {}
        for group in groups:
            if all(version in held[place] for place in group.places):
                continue
            helpers = [known[group.number, member].get(version) for member in range(len(group.places))]
            told = [one for one in helpers if one is not None]
            if not told or len(group.places) - len(told) > group.tolerated:
                break
            rebuild[group.number] = told[0]
        else:
            return Recovery(version, rebuild)
    return None


def complete_version(memories: Collection[InMemory], workers: int) -> Version | None:
    """The newest snapshot of which the parts of all ranks are in some memory, in whatever layout; None: there is none.

    ``workers`` is the number of ranks where a node does not know it.
    """
    known = {version for memory in memories for version in parts_of(memory)}
    whole = (version for version in known if _ranks_held(memories, version) == world_of(memories, version, workers))
    return max(whole, default=None)


def parts_of(memory: InMemory) -> dict[Version, set[int]]:
    """By snapshot the ranks whose parts are kept."""
    found: dict[Version, set[int]] = {}
    for part in memory.parts:
        found.setdefault(Version(part.generation, part.step, part.shard_map), set()).add(part.rank)
    return found


def world_of(memories: Collection[InMemory], version: Version, workers: int) -> set[int]:
    """All ranks that made a snapshot."""
    return set(range(next(filter(None, _sizes(memories, version)), workers)))


def newest_known(memories: Sequence[InMemory | None], ranks_per_node: int) -> Version | None:
    """The newest snapshot of which any node holds its part."""
    held = _all_held(memories, ranks_per_node)
    return max((version for of_node in held for version in of_node), default=None)


def lacking(
    group: Group, memories: Sequence[InMemory | None], ranks_per_node: int, version: Version
) -> tuple[int, ...]:
    """The places of a group that have lost their part of a snapshot."""
    held = _all_held(memories, ranks_per_node)
    return tuple(place for place in group.places if version not in held[place])


def _all_held(memories: Sequence[InMemory | None], ranks_per_node: int) -> list[set[Version]]:
    """By place: the snapshots, made by so many ranks, of which the node there holds the parts of all its ranks."""
    world_size = len(memories) * ranks_per_node
    return [_held(memory, place, ranks_per_node, world_size) for place, memory in enumerate(memories)]


def _held(memory: InMemory | None, place: int, ranks_per_node: int, world_size: int) -> set[Version]:
    ranks = range(place * ranks_per_node, (place + 1) * ranks_per_node)
    by_rank: dict[int, set[Version]] = {rank: set() for rank in ranks}
    for part in memory.parts if memory is not None else ():
        if part.rank in by_rank and part.world_size in (None, world_size):
            by_rank[part.rank].add(Version(part.generation, part.step, part.shard_map))
    return set.intersection(*by_rank.values())


def _protected(memory: InMemory | None, group: Group, member: int) -> dict[Version, ProtectedPart]:
    """The snapshots that a member of a group can help to rebuild."""
    return {
        Version(*one.version): one
        for one in (memory.protected if memory is not None else ())
        if (one.stripe, one.member, one.code) == (group.name, member, group.code)
    }


def _ranks_held(memories: Collection[InMemory], version: Version) -> set[int]:
    return set().union(*(parts_of(memory).get(version, set()) for memory in memories))


def _sizes(memories: Collection[InMemory], version: Version) -> Iterator[int | None]:
    for memory in memories:
        for part in memory.parts:
            if (part.generation, part.step, part.shard_map) == version:
                yield part.world_size
