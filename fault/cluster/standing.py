"""What records say of nodes now: which cordons stand, and what speaks against whom. Pure functions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from evermesh.fault.cluster.identity import NodeIdentity, covers
from evermesh.fault.cluster.records import Cordon, Evidence, Record, Uncordon


@dataclass(frozen=True, slots=True)
class NodeHistory:
    """One node, as far as it is known."""

    node: NodeIdentity
    """As its newest evidence has it."""
    evidence: tuple[Evidence, ...] = ()
    """Oldest first; what was forgiven is left out."""
    cordon: Cordon | None = None
    """That stands now."""


def standing_cordons(records: Iterable[Record], now_s: float) -> list[Cordon]:
    """The newest cordon of every node or host, unless it was lifted or its time is over. ``records``: oldest first."""
    found: dict[str, Cordon] = {}
    for record in records:
        if isinstance(record, Cordon):
            found[record.node] = record
        elif isinstance(record, Uncordon):
            for node in [node for node in found if covers(record.node, node)]:
                del found[node]
    return [cordon for cordon in found.values() if not cordon.is_over(now_s)]


def cordon_of(node: NodeIdentity, cordons: Sequence[Cordon]) -> Cordon | None:
    """The cordon that keeps jobs from a node; None: they may use it. One of another machine of that name does not count."""
    for cordon in cordons:
        is_other = cordon.machine and node.machine and cordon.machine != node.machine
        if covers(cordon.node, node.name) and not is_other:
            return cordon
    return None


def evidence_against(node: NodeIdentity, records: Iterable[Record]) -> tuple[Evidence, ...]:
    """What speaks against a node, oldest first, and was not forgiven. ``records``: oldest first."""
    found: list[Evidence] = []
    for record in records:
        if isinstance(record, Evidence) and record.node.may_be(node):
            found.append(record)
        elif isinstance(record, Uncordon) and covers(record.node, node.name):
            found.clear()
    return tuple(found)


def records_by_node(records: Iterable[Record], names: Iterable[str]) -> dict[str, list[Record]]:
    """For each of these nodes the evidence about its name, and what was lifted of it, oldest first: one pass over all."""
    found: dict[str, list[Record]] = {name: [] for name in names}
    for record in records:
        if isinstance(record, Evidence):
            if record.node.name in found:
                found[record.node.name].append(record)
        elif isinstance(record, Uncordon):
            for name in found:
                if covers(record.node, name):
                    found[name].append(record)
    return found


def known_nodes(records: Sequence[Record], now_s: float) -> list[NodeHistory]:
    """All nodes of which something is known, by name; a cordoned host of which nothing else is known stands by itself."""
    cordons = standing_cordons(records, now_s)
    newest: Mapping[str, NodeIdentity] = {
        record.node.name: record.node for record in records if isinstance(record, Evidence)
    }
    nodes = dict(newest)
    for cordon in cordons:
        if not any(covers(cordon.node, name) for name in newest):
            nodes[cordon.node] = NodeIdentity(name=cordon.node, machine=cordon.machine)
    own = records_by_node(records, nodes)
    return [
        NodeHistory(node, evidence_against(node, own[name]), cordon_of(node, cordons))
        for name, node in sorted(nodes.items())
    ]
