"""A topology as arrays: cards, ports, leaves, spines and the links between them, without those that are broken.

A *link* has one direction. Every cable is two of them, which break together: from a port to its leaf and back, from a leaf
to a spine and back. A cable is named ``NODE/CARD/PORT`` or ``LEAF-SPINE``.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evermesh.parallelism.errors import TrafficImpossible
from evermesh.parallelism.fabric.cards import common_class
from evermesh.parallelism.topology import Nic, Node, Topology

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Card:
    """A card that the job uses."""

    place: int
    """Of its node in the order of ranks."""
    nic: Nic
    ports: tuple[int, ...]
    """Numbers of its ports, left first; broken ones too."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """The network of the nodes of a job, in the order of its ranks."""

    nodes: tuple[Node, ...]
    devices: int
    """Of every node."""
    nic_class: str
    """Of the cards that are used."""
    cards: tuple[Card, ...]
    own: tuple[tuple[int, ...], ...]
    """Numbers of the cards of every place."""
    port_leaf: Ints
    port_bytes_per_s: Floats
    """By port, one direction; 0: broken."""
    leaves: tuple[str, ...]
    spines: tuple[str, ...]
    trunk_bytes_per_s: Floats
    """By leaf, by spine, one direction; 0: there is no link, or it is broken."""

    @classmethod
    def of(cls, topology: Topology, order: Sequence[int] | None = None) -> "Wiring":
        """All nodes of ``topology``, or those of ``order`` (indices) in this order.

        Raises:
            TrafficImpossible: nodes differ in their number of devices, share no class of cards, or are not wired.
        """
        nodes = tuple(topology.nodes[at] for at in (order if order is not None else range(len(topology.nodes))))
        _check_devices(nodes)
        nic_class = common_class(nodes)
        leaves = {leaf.name: number for number, leaf in enumerate(topology.leaves)}
        spines = tuple(dict.fromkeys(spine for leaf in topology.leaves for spine in leaf.spines))
        trunks = np.zeros((len(leaves), len(spines)))
        for leaf in topology.leaves:
            trunks[leaves[leaf.name], [spines.index(spine) for spine in leaf.spines]] = leaf.bytes_per_s
        cards, own, port_leaf, port_speed = list[Card](), list[tuple[int, ...]](), list[int](), list[float]()
        for place, node in enumerate(nodes):
            first = len(cards)
            for nic in _used(node, nic_class):
                cards.append(Card(place, nic, tuple(range(len(port_leaf), len(port_leaf) + len(nic.leaves)))))
                port_leaf += [leaves[name] for name in nic.leaves]
                port_speed += [nic.bytes_per_s / len(nic.leaves)] * len(nic.leaves)
            own.append(tuple(range(first, len(cards))))
        return cls(
            nodes=nodes,
            devices=nodes[0].devices,
            nic_class=nic_class,
            cards=tuple(cards),
            own=tuple(own),
            port_leaf=np.array(port_leaf, np.int64),
            port_bytes_per_s=np.array(port_speed),
            leaves=tuple(leaves),
            spines=spines,
            trunk_bytes_per_s=trunks,
        )

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.devices * len(self.nodes)

    def card_of(self, rank: int) -> int:
        """The card through which a rank talks: devices share those of their node in order, rank i of n has card i of n.

        Where no port of that card has a cable, it is the next one of the node.

        Raises:
            TrafficImpossible: no card of the node has a cable.
        """
        place, device = divmod(rank, self.devices)
        own = self.own[place]
        first = device * len(own) // self.devices
        for card in (*own[first:], *own[:first]):
            if self.is_alive(card):
                return card
        raise TrafficImpossible(
            f"no card of node {self.nodes[place].name} has a cable that is not broken. Repair one, or leave the node out."
        )

    def is_alive(self, card: int) -> bool:
        """Whether some port of a card has a cable."""
        return bool(self.port_bytes_per_s[list(self.cards[card].ports)].any())

    def port_names(self) -> list[str]:
        """By port, ``NODE/CARD/PORT``."""
        return [
            f"{self.nodes[card.place].name}/{card.nic.name}/{side}"
            for card in self.cards
            for side in range(len(card.ports))
        ]

    def without(self, failed: Iterable[str]) -> "Wiring":
        """The same without these cables, or without all cables of a switch.

        Raises:
            TrafficImpossible: there is nothing of that name.
        """
        trunks, ports = self.trunk_bytes_per_s.copy(), self.port_bytes_per_s.copy()
        known = None
        for name in failed:
            known = known if known is not None else dict(self._cables())
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f" Did you mean {near[0]}?" if near else ""
                raise TrafficImpossible(
                    f"{name} is no cable and no switch of this topology.{hint} Cables are named LEAF-SPINE, or "
                    f"NODE/CARD/PORT with ports counted from 0; there are {len(known):,} cables and switches."
                )
            for array, at in known[name]:
                (trunks if array == "trunk" else ports)[at] = 0.0
        return replace(self, trunk_bytes_per_s=trunks, port_bytes_per_s=ports)

    def _cables(self) -> Iterator[tuple[str, list[tuple[str, Any]]]]:
        """Names, and what breaks: an index into the trunks or the ports."""
        for leaf, spine in np.argwhere(self.trunk_bytes_per_s).tolist():
            yield f"{self.leaves[leaf]}-{self.spines[spine]}", [("trunk", (leaf, spine))]
        for port, name in enumerate(self.port_names()):
            yield name, [("port", port)]
        for leaf, name in enumerate(self.leaves):
            yield name, [("trunk", (leaf, slice(None))), ("port", np.flatnonzero(self.port_leaf == leaf))]
        for spine, name in enumerate(self.spines):
            yield name, [("trunk", (slice(None), spine))]


def _check_devices(nodes: Sequence[Node]) -> None:
    if different := next((node for node in nodes if node.devices != nodes[0].devices), None):
        raise TrafficImpossible(
            f"node {different.name} has {different.devices} devices, node {nodes[0].name} has {nodes[0].devices}. "
            "Describe nodes with equally many; leave out devices that others do not have."
        )


def _used(node: Node, nic_class: str) -> list[Nic]:
    used = [nic for nic in node.nics if nic.nic_class == nic_class]
    if bare := next((nic for nic in used if not nic.leaves), None):
        raise TrafficImpossible(
            f"the topology does not say where card {bare.name} of node {node.name} is wired to. Give it leaves: the name of "
            "the leaf switch behind each of its ports; and list these switches under leaves, each with its spines."
        )
    return used


__all__ = ["Bools", "Card", "Floats", "Ints", "Wiring"]
