"""Which keepers must be hosted for lost ones so that a snapshot is whole again: a pure function of what agents tell.

It needs neither the places nor the number of nodes of the attempt that made the snapshot: whoever can help to rebuild it
knows the members of its stripe with their ranks.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count, cycle
from typing import NamedTuple

from evermesh.fault.snapshot.choosing import Version
from evermesh.launcher.messages import InMemory, ProtectedPart


class KeeperName(NamedTuple):
    """A keeper: that of a node, or a guest that the node hosts in the place of one that was lost."""

    node: str
    guest: str | None = None

    def __str__(self) -> str:
        return self.node if self.guest is None else f"{self.guest} on {self.node}"


class OldStripe(NamedTuple):
    """A stripe that protected a snapshot, with those who take part when it is rebuilt."""

    protected: ProtectedPart
    """As one who can help knows it."""
    members: tuple[KeeperName, ...]
    """By rank in the stripe."""

    def ranks(self, member: int) -> tuple[int, ...]:
        """The ranks whose parts a member keeps."""
        return tuple(portion[0] for portion in self.protected.portions[member])

    def __str__(self) -> str:
        return f"{self.protected.stripe} ({', '.join(map(str, self.members))}; code {self.protected.code})"


class GuestPlan(NamedTuple):
    """How a snapshot becomes whole."""

    version: Version
    stripes: tuple[OldStripe, ...]
    """Those in which somebody lacks his part."""
    guests: Mapping[KeeperName, tuple[int, ...]]
    """The new ones, with the ranks whose parts they are to keep."""


def complete_version(memories: Collection[InMemory], workers: int) -> Version | None:
    """The newest snapshot of which the parts of all ranks are in some memory, in whatever layout; None: there is none.

    ``workers`` is the number of ranks where a node does not know it.
    """
    known = {version for memory in memories for version in _parts(memory)}
    whole = (version for version in known if _held(memories, version) == _world(memories, version, workers))
    return max(whole, default=None)


def plan_guests(
    memories: Mapping[KeeperName, InMemory],
    hosts: Sequence[str],
    label: str,
    workers: int,
    unwanted: Collection[Version] = (),
) -> GuestPlan | None:
    """The newest snapshot that is whole with guests for those who were lost; None: none is, or one as new is without.

    Args:
        memories: what is kept in the memory of nodes that are there, and of guests there.
        hosts: nodes that may have guests, the best first. Only those are asked that have a part of the snapshot themselves.
        label: with which the names of new guests begin; no guest before had it.
        workers: as :func:`complete_version`.
        unwanted: snapshots that were tried in vain.
    """
    complete = complete_version(list(memories.values()), workers)
    known = {Version(*one.version) for memory in memories.values() for one in memory.protected}
    for version in sorted(known - set(unwanted), reverse=True):
        if complete is not None and version <= complete:
            return None
        plan = _plan(version, memories, hosts, label, workers)
        if plan is not None:
            return plan
    return None


def _plan(
    version: Version, memories: Mapping[KeeperName, InMemory], hosts: Sequence[str], label: str, workers: int
) -> GuestPlan | None:
    held = {name: _parts(memory).get(version, set()) for name, memory in memories.items()}
    able = [host for host in hosts if held.get(KeeperName(host))]
    names = (KeeperName(host, f"{label}-{number}") for host, number in zip(cycle(able), count()))
    there = set().union(*held.values())
    stripes, guests = [], dict[KeeperName, tuple[int, ...]]()
    for helpers in _stripes(version, memories).values():
        protected = next(iter(helpers.values()))[1]
        members = []
        for member, portions in enumerate(protected.portions):
            ranks = {portion[0] for portion in portions}
            found = helpers[member][0] if member in helpers else _keeper_with(ranks, held)
            if found is None:
                found = next(names, None)
                if found is None:
                    return None
                guests[found] = tuple(sorted(ranks))
            members.append(found)
        stripe = OldStripe(protected, tuple(members))
        ranks = {rank for member in range(len(members)) for rank in stripe.ranks(member)}
        if ranks <= there:
            continue
        if len(members) - len(helpers) > int(protected.code.partition("+")[2]):
            return None
        there |= ranks
        stripes.append(stripe)
    is_whole = there == _world(memories.values(), version, workers)
    return GuestPlan(version, tuple(stripes), guests) if is_whole else None


def _stripes(
    version: Version, memories: Mapping[KeeperName, InMemory]
) -> dict[tuple[str, str], dict[int, tuple[KeeperName, ProtectedPart]]]:
    """By name and code of a stripe: by member who can help to rebuild the snapshot, and what it knows."""
    found: dict[tuple[str, str], dict[int, tuple[KeeperName, ProtectedPart]]] = {}
    for name, memory in memories.items():
        for one in memory.protected:
            if Version(*one.version) == version:
                found.setdefault((one.stripe, one.code), {})[one.member] = name, one
    return found


def _keeper_with(ranks: Collection[int], held: Mapping[KeeperName, Collection[int]]) -> KeeperName | None:
    """Who has the parts of some of these ranks, though no parity."""
    return next((name for name, parts in held.items() if not set(ranks).isdisjoint(parts)), None)


def _parts(memory: InMemory) -> dict[Version, set[int]]:
    """By snapshot the ranks whose parts are kept."""
    found: dict[Version, set[int]] = {}
    for part in memory.parts:
        found.setdefault(Version(part.generation, part.step, part.shard_map), set()).add(part.rank)
    return found


def _held(memories: Collection[InMemory], version: Version) -> set[int]:
    return set().union(*(_parts(memory).get(version, set()) for memory in memories))


def _world(memories: Collection[InMemory], version: Version, workers: int) -> set[int]:
    """All ranks that made a snapshot."""
    return set(range(next(filter(None, _sizes(memories, version)), workers)))


def _sizes(memories: Collection[InMemory], version: Version) -> Iterator[int | None]:
    for memory in memories:
        for part in memory.parts:
            if (part.generation, part.step, part.shard_map) == version:
                yield part.world_size
