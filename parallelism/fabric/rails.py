"""Which groups leave their rail, their leaf or their rack, and with how many bytes a step."""

from dataclasses import dataclass

import numpy as np

from evermesh.parallelism.fabric.flows import Flows, Label
from evermesh.parallelism.fabric.wiring import Bools, Wiring


@dataclass(frozen=True, slots=True)
class RailRow:
    """Of one label: bytes of a step that leave nodes, and of these what leaves more."""

    label: Label
    node_bytes: float
    rail_bytes: float
    """From a card to one on another rail."""
    leaf_bytes: float
    """Between cards that are wired to no leaf in common: over spines."""
    rack_bytes: float
    """Between nodes of different racks; a node whose rack is not known is a rack of its own."""


def rail_report(flows: Flows, wiring: Wiring) -> list[RailRow]:
    """One row for every label, the largest first."""
    rails = np.array([card.nic.rail for card in wiring.cards], np.int64)
    racks = np.array([_rack(wiring, card.place) for card in wiring.cards], dtype=object)
    leaves_rail = rails[flows.source] != rails[flows.target]
    leaves_rack = racks[flows.source] != racks[flows.target]
    leaves_leaf = ~_share_leaf(flows, wiring)
    rows = []
    for number, label in enumerate(flows.labels):
        own = flows.label == number
        sums = [float(flows.num_bytes[own & leaves].sum()) for leaves in (leaves_rail, leaves_leaf, leaves_rack)]
        rows.append(RailRow(label, float(flows.num_bytes[own].sum()), *sums))
    return sorted(rows, key=lambda row: -row.node_bytes)


def _rack(wiring: Wiring, place: int) -> str:
    node = wiring.nodes[place]
    return node.rack or f"\0{node.name}"


def _share_leaf(flows: Flows, wiring: Wiring) -> Bools:
    sets: dict[frozenset[int], int] = {}
    of_card = np.array(
        [sets.setdefault(frozenset(wiring.port_leaf[list(card.ports)].tolist()), len(sets)) for card in wiring.cards]
    )
    known = list(sets)
    share = np.array([[bool(one & other) for other in known] for one in known], bool).reshape(len(known), len(known))
    return np.asarray(share[of_card[flows.source], of_card[flows.target]], bool)


__all__ = ["RailRow", "rail_report"]
