"""Which nodes take which places of an attempt, so that its stripes span racks. Pure functions.

Places are dealt out to the stripes in turns (``groups_of``), and keep their stripe whichever nodes take them. So nodes are
put in order: sorted by rack, those of one rack go to stripes in turns, which is as far apart as they can be. While an attempt
keeps its size everybody who is left keeps his place, for that is where he is looked for, and a lost node is replaced
by the spare whose rack occurs least in the stripe. With another size all are put in order again.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from evermesh.launcher.controller.recovery import Group

if TYPE_CHECKING:
    from evermesh.fault.snapshot.stripes.placement import Candidate, StripePlan

_MOST_PARTS = 8
"""Of a stripe that is chosen here, as without racks."""


def place_nodes(
    chosen: tuple[str, ...],
    before: tuple[str, ...],
    ready: Collection[str],
    racks: Mapping[str, str],
    groups: Sequence[Group],
) -> tuple[str, ...]:
    """The nodes of the next attempt, by place.

    Args:
        chosen: as they would be without racks; enough for all places.
        before: of the attempt before.
        ready: all that may take part, spares too.
        racks: by node; one that is not named counts as a rack of its own.
        groups: the stripes of the places.
    """
    if not racks or groups[0].code is None:
        return chosen
    if len(before) != len(chosen):
        return _in_order(chosen, racks)
    from evermesh.fault.snapshot.stripes.placement import replace_nodes

    lost = [name for name in before if name not in ready]
    spares = [name for name in ready if name not in before]
    filled = replace_nodes(_plan(before, groups), _candidates(before, racks), lost, _candidates(spares, racks))
    found = {
        place: name
        for group, stripe in zip(groups, filled.stripes, strict=True)
        for place, name in zip(group.places, stripe.nodes, strict=True)
    }
    names = tuple(name for _, name in sorted(found.items()) if name is not None)
    assert len(names) == len(chosen), "there are enough nodes for all places"
    return names


@lru_cache
def code_for_racks(nodes: int, hosts: tuple[int, ...]) -> str:
    """What ``auto`` is for so many nodes where racks are known: of the codes with which one rack may be lost, that with the
    least parity for its data, never less parity than without racks nor more than data. ``auto`` where there is none.

    ``hosts`` has for each rack how many the job file names; nodes are taken to be spread over them as evenly as these allow.
    """
    from evermesh.fault.snapshot.coding import Code
    from evermesh.fault.snapshot.stripes.placement import auto_code, plan_stripes

    candidates = _spread(nodes, hosts)
    least = auto_code([replace(node, domains={}) for node in candidates]).parity
    found = []
    for parity in range(least, _MOST_PARTS // 2 + 1):
        for parts in range(min(nodes, _MOST_PARTS), 2 * parity - 1, -1):
            plan = plan_stripes(candidates, Code(parts - parity, parity))
            more = max(stripe.code.parity / stripe.code.data for stripe in plan.stripes)
            if more <= 1 and all(guarantee.survives for guarantee in plan.guarantees):
                found.append((more, parity, -parts))
    if not found:
        return "auto"
    _, parity, parts = min(found)
    return str(Code(-parts - parity, parity))


def most_in_rack(nodes: Sequence[str], racks: Mapping[str, str], groups: Sequence[Group]) -> int:
    """Members of one stripe that one rack has at most; a node of which no rack is known is a rack of its own."""
    of_stripe = (Counter(racks.get(nodes[place], f"\0{nodes[place]}") for place in group.places) for group in groups)
    return max(max(counts.values()) for counts in of_stripe)


def lost_rack(nodes: tuple[str, ...], racks: Mapping[str, str], groups: Sequence[Group]) -> str | None:
    """What the loss of one rack would cost, and what helps, for people; None if the stripes survive any, or nothing is
    known of racks."""
    if not racks or groups[0].code is None:
        return None
    now = _judged(nodes, racks, groups)
    if all(guarantee.survives for guarantee in now.guarantees):
        return None
    best = _judged(_in_order(nodes, racks), racks, groups)
    if all(guarantee.survives for guarantee in best.guarantees):
        way_out = "A spare of another rack has taken a place; when the run is resumed nodes are put in order again."
    else:
        way_out = f"In any order, {best.warnings[0]}"
    return f"{now.guarantees[0]}. {way_out}"


def _spread(nodes: int, hosts: Sequence[int]) -> "list[Candidate]":
    from evermesh.fault.snapshot.stripes.placement import Candidate

    turns = sorted((turn, rack) for rack, number in enumerate(hosts) for turn in range(number))
    racks = [str(rack) for _, rack in turns[:nodes]]
    domains = [{"rack": rack} for rack in racks] + [{}] * (nodes - len(racks))  # who is not named has a rack of his own
    return [Candidate(str(place), told) for place, told in enumerate(domains)]


def _in_order(nodes: Sequence[str], racks: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(sorted(nodes, key=lambda name: racks.get(name, f"\0{name}")))


def _judged(nodes: tuple[str, ...], racks: Mapping[str, str], groups: Sequence[Group]) -> "StripePlan":
    from evermesh.fault.snapshot.stripes.placement import replace_nodes

    return replace_nodes(_plan(nodes, groups), _candidates(nodes, racks), (), ())


def _plan(nodes: tuple[str, ...], groups: Sequence[Group]) -> "StripePlan":
    from evermesh.fault.snapshot.coding import Code
    from evermesh.fault.snapshot.stripes.placement import Stripe, StripePlan

    stripes = (Stripe(tuple(nodes[place] for place in group.places), Code.parse(str(group.code))) for group in groups)
    return StripePlan(tuple(stripes), ())


def _candidates(nodes: Sequence[str], racks: Mapping[str, str]) -> "list[Candidate]":
    from evermesh.fault.snapshot.stripes.placement import Candidate

    return [Candidate(name, {"rack": racks[name]} if name in racks else {}) for name in nodes]
