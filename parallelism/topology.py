"""What the cluster is made of: nodes, devices, network cards and their ports, racks, rails, leaf and spine switches, link
speeds and the speed of each rank."""

from collections import Counter
from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from evermesh.parallelism.errors import LayoutDoesNotFit


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Nic(_Frozen):
    """One network card of a node."""

    name: str
    """Interface name, such as ``eth0`` or ``mlx5_0``."""
    nic_class: str = "ethernet"
    """Class within which ranks talk fast: ``infiniband``, ``roce``, ``ethernet`` or ``loopback``."""
    bytes_per_s: PositiveFloat
    """Bandwidth in one direction, bytes per second."""
    rail: NonNegativeInt = 0
    """Rail (switch plane) that the card is wired to."""
    leaves: tuple[str, ...] = ()
    """Leaf switch behind each physical port: one, or for a bonded card several, left first. Each port has an even share of
    ``bytes_per_s``. Empty: not known."""


class Node(_Frozen):
    """One machine."""

    name: str
    devices: PositiveInt
    """Accelerators, or worker slots on a machine without any."""
    device_kind: str = "cpu"
    nics: tuple[Nic, ...] = ()
    rack: str | None = None
    """None: not known; it then counts as a rack of its own."""
    switch: str | None = None
    """Leaf switch that the node fails with; None: not known."""
    intra_bytes_per_s: PositiveFloat = 1e9
    """Bandwidth between two devices of this node (NVLink, PCIe or shared memory), bytes per second."""


class Leaf(_Frozen):
    """A switch that cards are wired to."""

    name: str
    spines: tuple[str, ...] = ()
    """The spine switches that it has a link to. Parallel cables to one spine count as one link, as fast as all of them."""
    bytes_per_s: PositiveFloat
    """Of each of these links, in one direction."""

    @model_validator(mode="after")
    def _spines_differ(self) -> Self:
        if twice := _first_twice(self.spines):
            raise ValueError(
                f"leaf {self.name} names spine {twice} twice; name it once, with the sum of the speeds in bytes_per_s"
            )
        return self


class Topology(_Frozen):
    """The cluster as the planner and the launcher see it.

    Serialised as JSON by ``model_dump_json`` and read back by ``model_validate_json``. Ranks are numbered node by node
    in the order of ``nodes``.
    """

    nodes: tuple[Node, ...]
    leaves: tuple[Leaf, ...] = ()
    """The leaf switches of a network of leaves and spines; empty: not known, nothing can be said of paths."""
    speeds: tuple[PositiveFloat, ...] = ()
    """Relative speed of every rank (1 is nominal); empty means all 1. The straggler detector lowers it."""
    speeds_version: NonNegativeInt = 0
    """Raised whenever ``speeds`` changes; every batch plan records the version it was made with."""

    @model_validator(mode="after")
    def _speeds_match_ranks(self) -> Self:
        if self.speeds and len(self.speeds) != self.world_size:
            raise ValueError(f"{len(self.speeds)} speeds for {self.world_size} ranks; give one per rank or none")
        return self

    @model_validator(mode="after")
    def _leaves_exist(self) -> Self:
        known = {leaf.name for leaf in self.leaves}
        if twice := _first_twice([leaf.name for leaf in self.leaves]):
            raise ValueError(f"there are two leaves {twice}; give every switch a name of its own")
        if both := sorted(known & {spine for leaf in self.leaves for spine in leaf.spines}):
            raise ValueError(f"{both[0]} is a leaf and a spine; give every switch a name of its own")
        for node in self.nodes:
            for nic in node.nics:
                if missing := sorted(set(nic.leaves) - known):
                    raise ValueError(
                        f"card {nic.name} of node {node.name} is wired to leaf {missing[0]}, which leaves does not have; "
                        "add it there, or correct the name"
                    )
        return self

    @classmethod
    def local(cls, workers: int) -> Self:
        """One machine with ``workers`` CPU worker slots that talk over loopback."""
        loopback = Nic(name="lo", nic_class="loopback", bytes_per_s=1e9)
        return cls(nodes=(Node(name="localhost", devices=workers, nics=(loopback,)),))

    @property
    def world_size(self) -> int:
        """Devices of all nodes."""
        return sum(node.devices for node in self.nodes)

    def node_of(self, rank: int) -> int:
        """Index in ``nodes`` of the node that hosts ``rank``.

        Raises:
            LayoutDoesNotFit: there is no such rank.
        """
        first = 0
        for index, node in enumerate(self.nodes):
            first += node.devices
            if 0 <= rank < first:
                return index
        raise LayoutDoesNotFit(f"rank {rank} does not exist: the topology has {self.world_size} ranks.")

    def speed_of(self, rank: int) -> float:
        """Relative speed of ``rank``."""
        return self.speeds[rank] if self.speeds else 1.0


def _first_twice(names: Sequence[str]) -> str | None:
    return next((name for name, number in Counter(names).items() if number > 1), None)
