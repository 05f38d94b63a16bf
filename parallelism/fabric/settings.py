"""The settings that make a job take its planned paths, as far as settings can: environment of each node, order of nodes.

Only documented variables are used, and each part of a plan says what brings it about: a setting, nothing but a good chance
(*advisory*), or a network plugin of NCCL, which alone can choose the port and the path of a queue pair.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from evermesh.parallelism.fabric.cards import RDMA, card_settings
from evermesh.parallelism.fabric.wiring import Wiring

How = Literal["enforced", "advisory", "needs a NCCL net plugin"]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a plan, and what brings it about."""

    part: str
    how: How
    by: str
    """The setting; or what decides instead, and what to look at."""


def environments(wiring: Wiring, *, parts: int = 1, pxn: bool = True) -> dict[str, dict[str, str]]:
    """Variables of NCCL and gloo by name of the node; arguments as the plan was made with."""
    return {node.name: _environment(wiring, place, parts=parts, pxn=pxn) for place, node in enumerate(wiring.nodes)}


def _environment(wiring: Wiring, place: int, *, parts: int, pxn: bool) -> dict[str, str]:
    usable = [wiring.cards[card].nic.name for card in wiring.own[place] if wiring.is_alive(card)]
    found = {one.name: one.value for one in card_settings(wiring.nodes[place], wiring.nic_class, usable)}
    streams = parts * max(len(card.ports) for card in wiring.cards)
    if wiring.nic_class in RDMA and streams > 1:
        queue_pairs = {"NCCL_IB_QPS_PER_CONNECTION": str(streams), "NCCL_IB_SPLIT_DATA_ON_QPS": "1"}
        found = {"NCCL_IB_HCA": found["NCCL_IB_HCA"], **queue_pairs} | found
    if _rails_match(wiring):
        found["NCCL_CROSS_NIC"] = "0"
    return found | ({"NCCL_P2P_PXN_LEVEL": "2"} if pxn else {"NCCL_PXN_DISABLE": "1"})


def _rails_match(wiring: Wiring) -> bool:
    """Whether card i is on the same rail in every node, each on its own."""
    rails = {tuple(wiring.cards[card].nic.rail for card in own) for own in wiring.own}
    return len(rails) == 1 and all(len(set(of_node)) == len(of_node) for of_node in rails)


def what_holds(wiring: Wiring, *, parts: int = 1, pxn: bool = True) -> list[Part]:
    """Every part of a plan with what brings it about."""
    is_rdma, ports = wiring.nic_class in RDMA, max(len(card.ports) for card in wiring.cards)
    cards = "NCCL_IB_HCA" if is_rdma else "NCCL_SOCKET_IFNAME"
    found = [
        Part("the cards that carry the job, without those that are cut off", "enforced", cards),
        Part(
            "the order of nodes",
            "advisory",
            "the hostfile has it for launchers that number ranks in its order (mpirun --hostfile; torchrun --node-rank by "
            "line); evermesh launch orders the nodes of a job itself, by topology: FILE in the job file",
        ),
        Part(
            "rank i talks over card i",
            "advisory",
            "NCCL takes the card nearest on PCIe: see NCCL_DEBUG=INFO with NCCL_DEBUG_SUBSYS=GRAPH; where a virtual machine "
            "hides PCIe, NCCL_TOPO_FILE tells it (not written: a topology has no PCIe addresses)",
        ),
        _rails(wiring),
        _messages(pxn=pxn),
    ]
    if is_rdma and ports * parts > 1:
        names = "NCCL_IB_QPS_PER_CONNECTION and NCCL_IB_SPLIT_DATA_ON_QPS; NCCL has a connection for every channel"
        found.append(Part(f"{ports * parts} streams of each connection, equally large", "enforced", names))
    if ports > 1:
        found.append(
            Part(
                "half of them on each port of a bonded card, left to left and right to right",
                "needs a NCCL net plugin",
                "without, the bond hashes queue pairs to ports; NCCL_NET_PLUGIN loads one that pins them",
            )
        )
    found += [
        Part(
            "the spine of each stream",
            "needs a NCCL net plugin",
            "without, switches hash (ECMP): the loads under hash; paths.json has the path of every stream for a plugin that "
            "sets the UDP source port of a queue pair",
        ),
        Part(
            "no stream over a broken cable between leaf and spine",
            "advisory",
            "switches take it out of their hash by themselves; its share then falls on others as the hash wants",
        ),
        Part(
            "all-reduces as rings (or trees) over the nodes in the order of ranks",
            "advisory",
            "NCCL chooses by size and builds its rings itself; NCCL_ALGO would force one for all sizes (not written)",
        ),
    ]
    if any(nic.nic_class == "ethernet" for node in wiring.nodes for nic in node.nics):
        found.append(Part("the interface of gloo", "enforced", "GLOO_SOCKET_IFNAME"))
    return found


def _rails(wiring: Wiring) -> Part:
    name = "rings and trees keep their rails"
    if not _rails_match(wiring):
        return Part(name, "advisory", "card i is not on one rail in all nodes, so NCCL_CROSS_NIC=0 would not keep them")
    return Part(name, "enforced", "NCCL_CROSS_NIC=0 (NCCL documents corner cases in which it still crosses)")


def _messages(*, pxn: bool) -> Part:
    name = "messages leave on the rail of their receiver"
    if not pxn:
        return Part("messages leave through the sender's card", "enforced", "NCCL_PXN_DISABLE=1")
    return Part(name, "enforced", "NCCL_P2P_PXN_LEVEL=2, where NVLink joins the devices of a node")


def env_text(variables: Mapping[str, str]) -> str:
    """As a shell and ``docker --env-file`` read it."""
    return "".join(f"{name}={value}\n" for name, value in variables.items())


def hostfile(wiring: Wiring) -> str:
    """Nodes in the order of ranks, as ``mpirun --hostfile`` reads it."""
    return "".join(f"{node.name} slots={wiring.devices}\n" for node in wiring.nodes)


__all__ = ["How", "Part", "env_text", "environments", "hostfile", "what_holds"]
