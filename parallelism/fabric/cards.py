"""Which class of cards nodes have in common, and what NCCL and gloo are told of it. Loads no numpy: controllers need it."""

from collections.abc import Sequence
from dataclasses import dataclass

from evermesh.parallelism.errors import TrafficImpossible
from evermesh.parallelism.topology import Node

RDMA = ("infiniband", "roce")
"""Classes of cards that NCCL uses without sockets."""
_SOCKETS = ("ethernet", "loopback")


@dataclass(frozen=True, slots=True)
class Setting:
    """A variable of a node, and what it follows from."""

    name: str
    value: str
    because: str


def card_settings(node: Node, nic_class: str, usable: Sequence[str]) -> list[Setting]:
    """Which cards of a node NCCL and gloo are to use: those ``usable`` of ``nic_class``, and an interface for sockets."""
    sockets = [nic.name for nic in node.nics if nic.nic_class in _SOCKETS]
    found: list[Setting] = []
    if nic_class in RDMA:
        found.append(Setting("NCCL_IB_HCA", f"={','.join(usable)}", f"cards of class {nic_class} that are up"))
    else:
        sockets = list(usable)
        fast = sorted({nic.nic_class for nic in node.nics if nic.nic_class in RDMA})
        if fast:
            why = f"not all nodes have {' or '.join(fast)}: the fastest class that all have is {nic_class}"
            found.append(Setting("NCCL_IB_DISABLE", "1", why))
    if sockets:
        why = "interfaces for sockets" if nic_class in RDMA else f"cards of class {nic_class} that are up"
        found.append(Setting("NCCL_SOCKET_IFNAME", f"={','.join(sockets)}", why))
        found.append(Setting("GLOO_SOCKET_IFNAME", sockets[0], "the first of these; gloo uses one"))
    return found


def common_class(nodes: Sequence[Node]) -> str:
    """The fastest class of cards that all nodes have.

    Raises:
        TrafficImpossible: there is none.
    """
    speeds = [
        {name: sum(nic.bytes_per_s for nic in node.nics if nic.nic_class == name) for name in _classes(node)}
        for node in nodes
    ]
    common = sorted(set.intersection(*(set(of_node) for of_node in speeds)))
    if not common:
        classes = {", ".join(of_node) or "none": node.name for node, of_node in zip(nodes, speeds, strict=True)}
        named = "; ".join(f"{name}: {nics}" for nics, name in classes.items())
        raise TrafficImpossible(
            f"no class of network cards is in all nodes ({named}). Add the cards that all have to the topology, or leave out "
            "the nodes without."
        )
    return max(common, key=lambda name: min(of_node[name] for of_node in speeds))


def _classes(node: Node) -> list[str]:
    return list(dict.fromkeys(nic.nic_class for nic in node.nics))


__all__ = ["RDMA", "Setting", "card_settings", "common_class"]
