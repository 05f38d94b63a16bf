"""How fast the ranks of a layout reach each other, on nodes in a given order; imports no torch.

A group whose ranks are all in one node uses the links of that node. One that crosses nodes uses a class of network cards
that all its nodes have: one communicator uses one kind of network (Holmes, arXiv 2312.03549: groups that mix
InfiniBand and RoCE fall back to Ethernet). The cards of a node are shared by all groups that cross its border at the same
time, and a library spreads a group over all of them, so rails need no care of their own.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout.degrees import Layout
from evermesh.parallelism.topology import Node, Topology

_MOST_KINDS = 4
"""Of nodes, that are tried in every order; of more, the fastest come first or last."""


class Network:
    """A topology whose nodes are used in the order ``order`` (indices of ``topology.nodes``).

    Raises:
        LayoutDoesNotFit: nodes have different numbers of devices.
    """

    def __init__(self, topology: Topology, order: Sequence[int] | None = None) -> None:
        self.topology = topology
        self.order = tuple(order) if order is not None else tuple(range(len(topology.nodes)))
        self.nodes = [topology.nodes[index] for index in self.order]
        self.devices = self.nodes[0].devices
        """Of every node."""
        if different := next((node for node in self.nodes if node.devices != self.devices), None):
            raise LayoutDoesNotFit(
                f"node {different.name} has {different.devices} devices, node {self.nodes[0].name} has {self.devices}. "
                "Describe nodes with equally many; leave out devices that others do not have."
            )
        self.world_size = self.devices * len(self.nodes)
        self.intra_bytes_per_s = min(node.intra_bytes_per_s for node in self.nodes)
        self.speeds = tuple(topology.speed_of(rank) for index in self.order for rank in _ranks(topology, index))
        self.is_even = len(set(self.speeds)) <= 1
        self._across: dict[int, float] = {}
        self._links: dict[tuple[int, bool], float] = {}

    def crosses_nodes(self, extent: int) -> bool:
        """Whether some block of ``extent`` consecutive ranks has ranks of two nodes."""
        return self.devices % extent != 0

    def group_bytes_per_s(self, size: int, stride: int) -> float:
        """What each rank of the slowest group sends at, one direction, while all groups do.

        The groups have ``size`` ranks each, every ``stride``-th of consecutive ranks.
        """
        extent = size * stride
        if not self.crosses_nodes(extent):
            return self.intra_bytes_per_s
        return min(self.intra_bytes_per_s, self._node_bytes_per_s(extent) / min(stride, self.devices))

    def device_bytes_per_s(self, extent: int) -> float:
        """The network share of each device in the slowest block of ``extent`` consecutive ranks, while all send."""
        return self._node_bytes_per_s(extent) / self.devices

    def link_bytes_per_s(self, distance: int, *, wraps: bool = False) -> float:
        """Of the slowest message from a rank to the one ``distance`` behind it, while all send; ``wraps``: around the end."""
        key = distance, wraps
        if key not in self._links:
            last = self.world_size if wraps else self.world_size - distance
            starts = range(0, max(last, 0), max(1, min(distance, self.devices)))
            ends = ((start // self.devices, (start + distance) % self.world_size // self.devices) for start in starts)
            self._links[key] = min((self._between(*pair) for pair in set(ends)), default=self.intra_bytes_per_s)
        return self._links[key]

    def _between(self, one: int, other: int) -> float:
        if one == other:
            return self.intra_bytes_per_s
        return _common_bytes_per_s([self.nodes[one], self.nodes[other]]) / self.devices

    def _node_bytes_per_s(self, extent: int) -> float:
        """Of all cards of a node together, of the slowest block of ``extent`` consecutive ranks that crosses nodes."""
        if extent not in self._across:
            blocks = {
                (start // self.devices, (start + extent - 1) // self.devices)
                for start in range(0, self.world_size - extent + 1, extent)
            }
            self._across[extent] = min(
                (_common_bytes_per_s(self.nodes[first : last + 1]) for first, last in blocks if first != last),
                default=self.intra_bytes_per_s * self.devices,
            )
        return self._across[extent]

    def stage_speeds(self, layout: Layout) -> tuple[float, ...]:
        """Of the devices of every pipeline rank: the slowest counts."""
        size = layout.stage_size
        return tuple(min(self.speeds[first : first + size]) for first in range(0, layout.world_size, size))

    def pipeline_speeds(self, layout: Layout, shares: Sequence[float]) -> tuple[float, ...]:
        """Of every HDP rank's pipeline, 1 where all stages take equally long on devices of speed 1.

        ``shares`` of the time of a micro-batch by pipeline rank; the slowest rank decides.
        """
        tp, size = layout.tp, layout.stage_size
        return tuple(
            1.0
            / max(
                layout.pp * share / min(self.speeds[pp * size + hdp * tp : pp * size + (hdp + 1) * tp])
                for pp, share in enumerate(shares)
            )
            for hdp in range(layout.hdp)
        )


def node_orders(topology: Topology) -> Iterator[tuple[int, ...]]:
    """Orders of the nodes that are worth trying: those alike stay together, in every order of their kinds.

    Alike are nodes with the same network cards, devices and speeds. Pipeline stages are blocks of consecutive ranks, so
    data-parallel groups then stay among nodes alike as far as their number allows, and only pipeline edges, which
    send least, go between kinds (Holmes, arXiv 2312.03549).
    """
    kinds: dict[object, list[int]] = defaultdict(list)
    for index, node in enumerate(topology.nodes):
        kinds[_kind(topology, index, node)].append(index)
    groups = list(kinds.values())
    if len(groups) > _MOST_KINDS:
        by_speed = sorted(groups, key=lambda group: _slowest(topology, group[0]))
        orders: Iterable[Sequence[list[int]]] = (by_speed[::-1], by_speed)
    else:
        orders = itertools.permutations(groups)
    for order in orders:
        yield tuple(index for group in order for index in group)


def _kind(topology: Topology, index: int, node: Node) -> object:
    nics = tuple(sorted((nic.nic_class, nic.bytes_per_s) for nic in node.nics))
    speeds = tuple(topology.speed_of(rank) for rank in _ranks(topology, index))
    return nics, node.device_kind, node.intra_bytes_per_s, speeds


def _slowest(topology: Topology, index: int) -> float:
    return min(topology.speed_of(rank) for rank in _ranks(topology, index))


def _ranks(topology: Topology, index: int) -> range:
    first = sum(node.devices for node in topology.nodes[:index])
    return range(first, first + topology.nodes[index].devices)


def _common_bytes_per_s(nodes: Sequence[Node]) -> float:
    """Of the fastest class of cards that all these nodes have, all cards of a node together; the slowest node counts."""
    common = set.intersection(*({nic.nic_class for nic in node.nics} for node in nodes))
    if not common:
        classes = {tuple(sorted({nic.nic_class for nic in node.nics})): node.name for node in nodes}
        named = "; ".join(f"{name}: {', '.join(nics) or 'none'}" for nics, name in classes.items())
        raise LayoutDoesNotFit(
            f"nodes that have to talk share no class of network cards ({named}). Add the card that all of them have, for "
            "example the one of class ethernet, to the topology."
        )
    return max(
        min(sum(nic.bytes_per_s for nic in node.nics if nic.nic_class == name) for node in nodes)
        for name in sorted(common)
    )


__all__ = ["Network", "node_orders"]
