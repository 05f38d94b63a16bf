"""The places of keepers in stripes: how they are given, and of the nodes of an attempt who is reached where, and has taken
his place."""

from collections.abc import Sequence
from typing import NamedTuple

from evermesh.launcher.controller.life import Life
from evermesh.launcher.controller.nodes import KeeperName, Nodes
from evermesh.launcher.controller.protection import NamedStripe
from evermesh.launcher.controller.recovery import Group
from evermesh.launcher.controller.scribe import Scribe
from evermesh.launcher.messages import JoinStripe, Keep


class Member(NamedTuple):
    """A keeper that takes a place in a stripe."""

    name: KeeperName
    port: int
    """Where the others reach it at the address of its node."""
    ranks: tuple[int, ...]
    """Whose snapshots it keeps."""


class Call(NamedTuple):
    """To take the places of a stripe, from which on nothing of an earlier epoch is done any more."""

    generation: int
    epoch: int
    stripe: str
    code: str
    bytes_per_s: float | None


def give_places(nodes: Nodes, call: Call, members: Sequence[Member]) -> None:
    """Have the members of a stripe, by rank in it, take their places."""
    addresses = tuple((nodes[member.name.node].address, member.port) for member in members)
    for number, member in enumerate(members):
        order = JoinStripe(
            **call._asdict(), guest=member.name.guest, member=number, addresses=addresses, ranks=member.ranks
        )
        nodes[member.name.node].send(order)


class Places:
    """Has the keepers of an attempt take their places, and knows which have."""

    def __init__(
        self, nodes: Nodes, life: Life, groups: Sequence[Group], scribe: Scribe, bytes_per_s: float | None
    ) -> None:
        self._nodes, self._life, self._groups, self._scribe = nodes, life, groups, scribe
        self._bytes_per_s, self._generation = bytes_per_s, scribe.generation
        self._ports: dict[str, int] = {}
        self._epochs: dict[int, int] = {}
        """By number of the group: of the places that its members were given last."""
        self._joined: dict[int, set[str]] = {}
        self.missing: dict[str, str] = {}
        """Nodes that cannot take part, and why."""

    def ask(self, name: str, launch: str) -> None:
        """Ask a node for its keeper; one that was there already says so again."""
        self._nodes[name].send(Keep(generation=self._generation, launch=launch))

    def take_port(self, name: str, port: int) -> bool:
        """The keeper of a node is reached there; whether it is another one than before."""
        group, before = self.group_of(name), self._ports.get(name)
        self._ports[name] = port
        if before != port or group.number not in self._epochs:
            self.missing.pop(name, None)
            self.give(group)
        return before is not None and before != port

    def give(self, group: Group) -> None:
        """Give all members of a group their places anew, once they are known to listen: what they do for earlier ones is
        given up."""
        members = self.named(group).nodes
        if group.code is None or any(name not in self._ports for name in members):
            return
        epoch = self._scribe.note("stripe", str(self.named(group)), number=group.number, nodes=list(members))
        self._epochs[group.number], self._joined[group.number] = epoch, set()
        call = Call(self._generation, epoch, group.name, group.code, self._bytes_per_s)
        there = [Member(KeeperName(name), self._ports[name], self._life.ranks_of(name)) for name in members]
        give_places(self._nodes, call, there)

    def give_all(self) -> None:
        """The same for all groups."""
        for group in self._groups:
            self.give(group)

    def note_joined(self, name: str) -> None:
        """A keeper has taken the place that it was given last."""
        self._joined[self.group_of(name).number].add(name)

    def has_joined(self, name: str) -> bool:
        return name in self._joined.get(self.group_of(name).number, ())

    def epoch_of(self, group: Group) -> int | None:
        """Of the places that were given last; None: none yet."""
        return self._epochs.get(group.number)

    @property
    def blocked(self) -> set[int]:
        """Numbers of the groups of which a member cannot take part."""
        return {self.group_of(name).number for name in self.missing}

    @property
    def awaited(self) -> list[str]:
        """Nodes whose keepers have not taken their places, though their groups could."""
        blocked = self.blocked
        return [
            name for name in self._life.nodes if not self.has_joined(name) and self.group_of(name).number not in blocked
        ]

    def group_of(self, name: str) -> Group:
        """The group of a node that takes part in the attempt."""
        place = self._life.nodes.index(name)
        return next(group for group in self._groups if place in group.places)

    def named(self, group: Group) -> NamedStripe:
        """A group with the names of its nodes."""
        return NamedStripe(group.number, tuple(self._life.nodes[place] for place in group.places), group.code)
