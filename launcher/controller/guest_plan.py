"""Which keepers must be hosted for lost ones so that a snapshot is whole again: a pure function of what agents tell.

It needs neither the places nor the number of nodes of the attempt that made the snapshot: whoever can help to rebuild it
knows the members of its stripe with their ranks.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import count, cycle
from typing import NamedTuple

from evermesh.fault.snapshot.choosing import Version
from evermesh.launcher.controller.nodes import KeeperName
from evermesh.launcher.controller.recovery import complete_version, parts_of, world_of
from evermesh.launcher.messages import InMemory, ProtectedPart


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
    held = {name: parts_of(memory).get(version, set()) for name, memory in memories.items()}
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
    is_whole = there == world_of(memories.values(), version, workers)
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
