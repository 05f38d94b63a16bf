"""The network between the nodes of a job: as its topology file says, else as agents tell; in which order nodes take their
places on it, and which settings follow from it."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from evermesh.fault.hardware.model import FoundNic
from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.nodes import Node, Nodes
from evermesh.launcher.elastic import layouts_on
from evermesh.parallelism import topology as described
from evermesh.parallelism.errors import EvermeshError
from evermesh.parallelism.fabric.cards import Setting, card_settings, common_class
from evermesh.parallelism.topology import Nic, Topology

if TYPE_CHECKING:
    from evermesh.parallelism.fabric.exchanges import Exchange

_UNKNOWN_BYTES_PER_S = {"infiniband": 25e9, "roce": 12.5e9, "ethernet": 1.25e9, "loopback": 1e9}
"""Where neither kernel nor driver tells, as of virtual cards."""
_VOCABULARY = 32_768
"""Of a model whose job does not say."""
_FEW = 3
"""Of so many nodes, at least, the order can matter."""


class Ordered(NamedTuple):
    """Nodes by place."""

    nodes: tuple[str, ...]
    told: str
    """What that saves, for people; empty if nothing."""


class Network:
    """What is known of the network between ``nodes``. ``given`` is the topology of the job file, by name of host or node."""

    def __init__(self, config: JobConfig, nodes: Nodes, given: Topology | None = None) -> None:
        self._config, self._nodes = config, nodes
        self._given = {node.name: node for node in given.nodes} if given is not None else {}
        self._leaves = given.leaves if given is not None else ()

    @property
    def racks(self) -> dict[str, str]:
        """By node: its rack, as far as the job file, the topology or agents tell."""
        return {name: rack for name, rack in ((node.name, self._rack(node)) for node in self._nodes) if rack}

    def order(self, chosen: tuple[str, ...]) -> Ordered | None:
        """Nodes of an attempt of which none has a place yet, such that least is sent over slow ways; None: for all that is
        known no order is better than another."""
        found = self._known(chosen)
        if found is None:
            return None
        from evermesh.parallelism.fabric.ordering import order_nodes

        try:
            best = order_nodes(found, self._exchanges(len(chosen)))
        except EvermeshError as error:  # what this layout sends is not known by formula
            return Ordered(chosen, f"nodes take places in the order of their names: {error}")
        names = tuple(chosen[at] for at in best.nodes)
        if best.crossing_bytes >= best.given_bytes:
            return Ordered(names, "")
        sizes = (
            f"{_mib(best.crossing_bytes)} of a step go between racks or classes of cards, not {_mib(best.given_bytes)}"
        )
        return Ordered(names, f"nodes take places in the order {', '.join(names)}: {sizes}")

    def fill(self, before: Sequence[str | None], spares: Sequence[str]) -> tuple[str, ...]:
        """The nodes of an attempt in their places, and in those that are None the spares that fit there best."""
        from evermesh.parallelism.fabric.ordering import take_places

        names = [*(name for name in before if name is not None), *spares]
        number = {name: at for at, name in enumerate(names)}
        given = [None if name is None else number[name] for name in before]
        found, free = self._known(names), iter(spares)
        if found is not None:
            with suppress(EvermeshError):  # what this layout sends is not known by formula
                exchanges = self._exchanges(len(before))
                places = take_places(found, exchanges, given, [number[name] for name in spares])
                return tuple(names[at] for at in places)
        return tuple(next(free) if name is None else name for name in before)

    def settings(self, names: Sequence[str]) -> dict[str, tuple[Setting, ...]]:
        """By node: what NCCL and gloo are to be told there. Nothing where a node does not tell its cards, or shares no class
        of cards with the others."""
        nodes = [self._described(name) for name in names]
        if not all(node.nics for node in nodes):
            return {}
        try:
            nic_class = common_class(nodes)
        except EvermeshError:
            return {}
        usable = {node.name: [nic.name for nic in node.nics if nic.nic_class == nic_class] for node in nodes}
        return {node.name: tuple(card_settings(node, nic_class, usable[node.name])) for node in nodes}

    def tensor_warning(self, nodes: int) -> str:
        """That ranks which share tensors are on different nodes, with numbers and a way out; empty where they are not."""
        per_node, layout = self._config.workers // self._config.nodes, self._config.train.layout
        if nodes == 1 or per_node % layout.tp == 0:
            return ""
        fitting = [degree for degree in range(1, layout.tp) if layout.tp % degree == 0 and per_node % degree == 0]
        return (
            f"train.layout.tp is {layout.tp}, but a node has {per_node} workers: tensor parallelism sends "
            f"{self._tensor_bytes(nodes)} of a step between nodes, and every layer waits for it. Set train.layout.tp to "
            f"{fitting[-1]}, or use nodes with {layout.tp} workers."
        )

    def _tensor_bytes(self, nodes: int) -> str:
        from evermesh.parallelism.fabric.ordering import bytes_between

        try:
            of_tensors = [one for one in self._exchanges(nodes) if one.axis == "tp"]
        except EvermeshError:  # as above
            return "much"
        return _mib(float(bytes_between(of_tensors, nodes, self._config.workers // self._config.nodes).sum()))

    def _known(self, names: Sequence[str]) -> Topology | None:
        """The topology of these nodes; None where all are alike, or too few for an order to matter."""
        nodes = [_under_racks(self._described(name)) for name in names]
        kinds = {frozenset((nic.nic_class, nic.leaves) for nic in node.nics) for node in nodes}
        if len(nodes) < _FEW or len(kinds) == 1:
            return None
        named = {leaf for node in nodes for nic in node.nics for leaf in nic.leaves}
        racks = sorted(named - {one.name for one in self._leaves})
        made = tuple(described.Leaf(name=rack, bytes_per_s=1e9) for rack in racks)
        return Topology(nodes=tuple(nodes), leaves=(*self._leaves, *made))

    def _described(self, name: str) -> described.Node:
        """A node as the planner sees it."""
        node, devices = self._nodes[name], self._config.workers // self._config.nodes
        given = self._of_file(node)
        nics = (given.nics if given is not None else ()) or tuple(_nics(node))
        return described.Node(name=name, devices=devices, nics=nics, rack=self._rack(node))

    def _of_file(self, node: Node) -> described.Node | None:
        return next((self._given[name] for name in (node.name, node.host, node.address) if name in self._given), None)

    def _rack(self, node: Node) -> str | None:
        given, told = self._of_file(node), self._config.racks
        found = node.hardware.rack if node.hardware is not None else None
        return told.get(node.host) or told.get(node.name) or (given.rack if given is not None else None) or found

    def _exchanges(self, nodes: int) -> "Sequence[Exchange]":
        """What the groups of the layout on so many nodes send each other in a step."""
        from evermesh.parallelism.fabric.even import even_plan
        from evermesh.parallelism.fabric.exchanges import plan_exchanges
        from evermesh.parallelism.fabric.model import model_of
        from evermesh.runtime.cost import ELEMENT_BYTES

        config, per_node = self._config, self._config.workers // self._config.nodes
        train, layout = config.train, layouts_on(config, per_node * nodes)[0].model_copy(update={"deepspeed": None})
        plan = even_plan(layout, train.data.context, train.data.batch_tokens)
        model = model_of(train.model.shape(_VOCABULARY), layout, ELEMENT_BYTES[train.dtype])
        return plan_exchanges(plan, model, [rank // per_node for rank in range(layout.world_size)])


def told_settings(settings: Mapping[str, Sequence[Setting]]) -> str:
    """In one line: what all nodes are told, and how many different values there are of the rest."""
    values: dict[str, set[str]] = {}
    for of_node in settings.values():
        for one in of_node:
            values.setdefault(one.name, set()).add(one.value)
    return ", ".join(f"{name}={min(found)}" if len(found) == 1 else f"{name} by node" for name, found in values.items())


def _nics(node: Node) -> list[Nic]:
    """The RDMA ports of a node that are up, and the interface at which its ranks are reached."""
    hardware = node.hardware
    if hardware is None:
        return []
    found = [_nic(nic, nic.rdma or nic.name, nic.nic_class) for nic in hardware.nics if nic.is_rdma and nic.is_up]
    socket = hardware.interface_of(node.address)
    if socket is None:
        return found
    return [*found, _nic(socket, socket.name, "loopback" if socket.nic_class == "loopback" else "ethernet")]


def _under_racks(node: described.Node) -> described.Node:
    """With its rack as the leaf of cards of which it is not known where they are wired to."""
    if node.rack is None or any(nic.leaves for nic in node.nics):
        return node
    nics = node.nics or (Nic(name="", bytes_per_s=_UNKNOWN_BYTES_PER_S["ethernet"]),)
    leaves = {"leaves": (f"rack {node.rack}",)}
    return node.model_copy(update={"nics": tuple(nic.model_copy(update=leaves) for nic in nics)})


def _nic(nic: FoundNic, name: str, nic_class: str) -> Nic:
    return Nic(name=name, nic_class=nic_class, bytes_per_s=nic.bytes_per_s or _UNKNOWN_BYTES_PER_S[nic_class])


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
