"""Which nodes take which places of an attempt: stripes that span racks come first, then bytes over slow ways."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from evermesh.launcher.controller.network import Network, Ordered
from evermesh.launcher.controller.racks import most_in_rack, place_nodes
from evermesh.launcher.controller.recovery import Group


class Asked(NamedTuple):
    """Nodes that are to be given places."""

    chosen: tuple[str, ...]
    """In the order of their names, or where they were; enough for all places."""
    before: tuple[str, ...]
    """Of the attempt before, by place."""
    ready: Sequence[str]
    """All that may take part, those that nothing speaks against first."""
    suspected: Mapping[str, float] = {}
    """The probability that a node is at fault."""


def seat_nodes(asked: Asked, network: Network, groups: Sequence[Group]) -> Ordered:
    """The nodes of the next attempt by place.

    While an attempt keeps its size everybody who is left keeps his place, for his memory has what belongs there. A lost node
    is replaced by a spare that keeps its stripe apart; without stripes, by the one that sends least over slow ways. With
    another size all places are given anew: such that least is sent over slow ways, unless a rack would then have more of a
    stripe than it need have.
    """
    chosen, before, racks = asked.chosen, asked.before, network.racks
    apart = place_nodes(chosen, before, asked.ready, racks, groups)
    is_protected = bool(racks) and groups[0].code is not None
    if len(before) == len(chosen):
        is_settled = is_protected or before == chosen
        return Ordered(apart if is_settled else network.fill(*_free(asked)), "")
    best = network.order(chosen)
    if best is None or (is_protected and most_in_rack(best.nodes, racks, groups) > most_in_rack(apart, racks, groups)):
        return Ordered(apart, "")
    return best


def _free(asked: Asked) -> tuple[list[str | None], list[str]]:
    """The places that are taken, and the spares for the others: as many as are needed, and those that are as good."""
    kept = [name if name in asked.ready else None for name in asked.before]
    spares = [name for name in asked.ready if name not in asked.before]
    worst = asked.suspected.get(spares[kept.count(None) - 1], 0.0)
    return kept, [name for name in spares if asked.suspected.get(name, 0.0) <= worst]
