"""Which nodes protect each other: stripes that span failure domains as widely as they can. Pure functions.

Nodes are sorted by their domains and dealt out to the stripes in turns. So of every domain with c nodes a stripe of n
gets at most ceil(c / n), the least there can be, and likewise of domains within domains. A rail runs through all racks:
racks and rails together are spread by colouring a graph, just as far; then a switch may have one node more in a stripe.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from evermesh.fault.snapshot.coding import Code
from evermesh.fault.snapshot.stripes.crossing import deal_crossing
from evermesh.fault.snapshot.stripes.errors import StripesImpossible
from evermesh.parallelism.topology import Topology

KINDS = ("rack", "switch", "rail")
"""Of failure domains; the first counts most."""

_AUTO_PARTS = 8
_AUTO_LEAST_DATA = 2
"""Data parts per parity part at least: at most half as much memory again."""
_TWO_PARITY_FROM = 6
"""Nodes from which on "auto" takes two parity parts."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A node that can be a member of a stripe."""

    node: str
    domains: Mapping[str, str] = field(default_factory=dict)
    """Its failure domains by kind; one that is not told counts as the node alone."""

    def domain(self, kind: str) -> str:
        """The failure domain of this kind."""
        return self.domains.get(kind) or f"\0{self.node}"


@dataclass(frozen=True, slots=True)
class Stripe:
    """Nodes that protect each other. A place keeps its number; one whose node is lost and not replaced is None."""

    nodes: tuple[str | None, ...]
    code: Code


class Guarantee(NamedTuple):
    """What stripes make of the loss of a whole failure domain."""

    kind: str
    domains: int
    """How many there are."""
    worst: int
    """Members of one stripe that one of them holds at most."""
    tolerated: int
    """Lost members that this stripe survives."""

    @property
    def survives(self) -> bool:
        """Whether any one domain may be lost."""
        return self.worst <= self.tolerated

    def __str__(self) -> str:
        verdict = "survived" if self.survives else "NOT survived"
        return (
            f"loss of one {self.kind} (of {self.domains}): at most {self.worst} members of a stripe, {self.tolerated} "
            f"are tolerated: {verdict}"
        )


@dataclass(frozen=True, slots=True)
class StripePlan:
    """Stripes, and what they survive."""

    stripes: tuple[Stripe, ...]
    guarantees: tuple[Guarantee, ...]
    """Of the kinds of domains that were told, in the order of ``KINDS``."""

    @property
    def warnings(self) -> list[str]:
        """Kinds of domains of which none may be lost, with what would help."""
        return [_advice(guarantee) for guarantee in self.guarantees if not guarantee.survives]

    def stripe_of(self, node: str) -> tuple[int, int]:
        """Number of the stripe and place of a node. Raises ``KeyError``."""
        for number, stripe in enumerate(self.stripes):
            if node in stripe.nodes:
                return number, stripe.nodes.index(node)
        raise KeyError(node)


def candidates(topology: Topology) -> list[Candidate]:
    """The nodes of a cluster with what is known of their racks, switches and rails.

    A rail is a failure domain of nodes that are wired to one rail only, where there are several.
    """
    all_rails = {nic.rail for node in topology.nodes for nic in node.nics}
    found = []
    for node in topology.nodes:
        rails = {nic.rail for nic in node.nics}
        rail = str(min(rails)) if len(rails) == 1 < len(all_rails) else None
        told = {"rack": node.rack, "switch": node.switch, "rail": rail}
        found.append(Candidate(node.name, {kind: label for kind, label in told.items() if label}))
    return found


def auto_code(nodes: Sequence[Candidate]) -> Code:
    """A code for these nodes: two parity parts from 6 nodes on, of 8 parts at most, and of fewer where few racks (or
    switches, or rails) could then be lost one at a time; at most half as much memory again.

    Raises:
        StripesImpossible: there is one node.
    """
    _check_number(nodes, 1)
    parity = 2 if len(nodes) >= _TWO_PARITY_FROM else 1
    most = min(len(nodes), _AUTO_PARTS)
    told = [kind for kind in KINDS if any(kind in node.domains for node in nodes)]
    fewest = min((len({node.domain(kind) for node in nodes}) for kind in told), default=len(nodes))
    for parts in range(most, parity * (1 + _AUTO_LEAST_DATA) - 1, -1):
        if -(-parts // fewest) <= parity:
            return Code(parts - parity, parity)
    return Code(most - parity, parity)


def plan_stripes(
    nodes: Sequence[Candidate], code: Code | Literal["auto"] = "auto", must_survive: Iterable[str] = ()
) -> StripePlan:
    """Stripes of about as many nodes as the code has parts, whose sizes differ by one at most.

    Where the number of nodes is no multiple, there are as many stripes as come nearest to that size, and each has the
    parity parts of ``code`` and as many data parts as it has other members.

    Args:
        must_survive: kinds of failure domains of which any one may be lost.

    Raises:
        StripesImpossible: fewer nodes than parity parts and one, or a domain of ``must_survive`` that may not be lost;
            says how many there would have to be.
    """
    code = auto_code(nodes) if code == "auto" else code
    _check_number(nodes, code.parity)
    kinds = [kind for kind in KINDS if any(kind in node.domains for node in nodes)]
    nearest = max(1, (2 * len(nodes) + code.parts) // (2 * code.parts))
    dealt = _deal(nodes, min(nearest, len(nodes) // (code.parity + 1)), kinds)
    stripes = [
        Stripe(tuple(nodes[at].node for at in sorted(members)), Code(len(members) - code.parity, code.parity))
        for members in dealt
    ]
    plan = _judged(stripes, {node.node: node for node in nodes}, kinds)
    for guarantee in plan.guarantees:
        if guarantee.kind in must_survive and not guarantee.survives:
            raise StripesImpossible(_advice(guarantee))
    return plan


def replace_nodes(
    plan: StripePlan, nodes: Sequence[Candidate], lost: Iterable[str], spares: Sequence[Candidate]
) -> StripePlan:
    """The same stripes after the loss of some nodes: a spare takes the place of each, everybody else stays where it is.

    Of the spares each place takes the one whose domains occur least in its stripe. Places for which there is none are
    None.

    Args:
        nodes: all of the plan, with their domains.
    """
    known = {node.node: node for node in (*nodes, *spares)}
    gone, left = set(lost), list(spares)
    kinds = [kind for kind in KINDS if any(kind in node.domains for node in known.values())]
    stripes = []
    for stripe in plan.stripes:
        members = [None if node in gone else node for node in stripe.nodes]
        for place in (place for place, node in enumerate(members) if node is None):
            if not left:
                break
            others = [known[node] for node in members if node is not None]
            best = min(left, key=lambda spare: _shared(spare, others, kinds))
            left.remove(best)
            members[place] = best.node
        stripes.append(replace(stripe, nodes=tuple(members)))
    return _judged(stripes, known, kinds)


def _shared(spare: Candidate, others: Sequence[Candidate], kinds: Sequence[str]) -> tuple[int, ...]:
    return tuple(sum(other.domain(kind) == spare.domain(kind) for other in others) for kind in kinds)


def _check_number(nodes: Sequence[Candidate], parity: int) -> None:
    if len(nodes) <= parity:
        raise StripesImpossible(
            f"{len(nodes)} nodes cannot keep {parity} parity parts for each other: that takes at least {parity + 1}. "
            "Start more nodes, or rely on checkpoints."
        )
    if len({node.node for node in nodes}) != len(nodes):
        twice = [name for name, number in Counter(node.node for node in nodes).items() if number > 1]
        raise StripesImpossible(
            f"nodes {', '.join(twice)} are named more than once. Give every node a name of its own."
        )


def _deal(nodes: Sequence[Candidate], number: int, kinds: Sequence[str]) -> list[list[int]]:
    """The nodes of every stripe, by index."""
    order = sorted(range(len(nodes)), key=lambda at: (*(nodes[at].domain(kind) for kind in kinds), at))
    if len(kinds) > 1 and "rail" in kinds:
        stripes = deal_crossing([(nodes[at].domain(kinds[0]), nodes[at].domain("rail")) for at in order], number)
    else:
        stripes = [position % number for position in range(len(order))]
    dealt: list[list[int]] = [[] for _ in range(number)]
    for at, stripe in zip(order, stripes, strict=True):
        dealt[stripe].append(at)
    return dealt


def _judged(stripes: Sequence[Stripe], nodes: Mapping[str, Candidate], kinds: Sequence[str]) -> StripePlan:
    guarantees = []
    present = {node for stripe in stripes for node in stripe.nodes if node is not None}
    for kind in kinds:
        worst = max(
            (
                (max(Counter(nodes[node].domain(kind) for node in stripe.nodes if node).values()), stripe)
                for stripe in stripes
                if any(stripe.nodes)
            ),
            key=lambda found: found[0] - found[1].code.parity + found[1].nodes.count(None),
        )
        domains = len({nodes[node].domain(kind) for node in present})
        left = worst[1].code.parity - worst[1].nodes.count(None)
        guarantees.append(Guarantee(kind, domains, worst[0], left))
    return StripePlan(tuple(stripes), tuple(guarantees))


def _advice(guarantee: Guarantee) -> str:
    return (
        f"the loss of one {guarantee.kind} costs a stripe up to {guarantee.worst} members, but it tolerates "
        f"{guarantee.tolerated}: {guarantee.domains} {guarantee.kind}s are too few for it. Take more parity, a shorter "
        f"code (at most {guarantee.domains * guarantee.tolerated} parts with {guarantee.tolerated} of parity), or nodes of "
        f"more {guarantee.kind}s; else such a loss falls back to the newest checkpoint on storage."
    )
