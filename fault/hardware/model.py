"""The network cards and GPUs of a node as its agent tells them. Loads the standard library alone: every agent needs it."""

from dataclasses import dataclass

RDMA = ("infiniband", "roce")
"""Classes of cards that NCCL uses without sockets."""


@dataclass(frozen=True, slots=True)
class FoundNic:
    """A network interface, or a port of an RDMA device with the interface that belongs to it."""

    name: str
    """Of the interface; of the RDMA device where it has none."""
    nic_class: str
    """``infiniband``, ``roce``, ``ethernet`` or ``loopback``, as in a topology."""
    is_up: bool
    """An interface has a carrier; a port of an RDMA device is ACTIVE."""
    bytes_per_s: float | None = None
    """One direction; None: neither kernel nor driver tells."""
    addresses: tuple[str, ...] = ()
    rdma: str | None = None
    """Name of the RDMA device, such as ``mlx5_0``."""
    port: int | None = None
    """Of the RDMA device, counted from 1."""
    pci: str = ""
    """Address on PCIe, such as ``0000:3b:00.0``; empty for what is no PCIe device."""
    numa: int | None = None

    @property
    def is_rdma(self) -> bool:
        return self.nic_class in RDMA


@dataclass(frozen=True, slots=True)
class FoundGpu:
    """A GPU as its driver tells it."""

    index: int
    name: str
    pci: str = ""
    numa: int | None = None
    nvlink_peers: tuple[int, ...] = ()
    """GPUs that it reaches over NVLink."""
    near: tuple[str, ...] = ()
    """The network cards nearest to it on PCIe: RDMA devices, or interfaces where there are none."""


@dataclass(frozen=True, slots=True)
class NodeHardware:
    """A node."""

    nics: tuple[FoundNic, ...] = ()
    gpus: tuple[FoundGpu, ...] = ()
    rack: str | None = None
    """Its rack, or leaf switch; None: nobody says."""
    rack_from: str = ""
    """Who says so."""

    def interface_of(self, address: str) -> FoundNic | None:
        """The interface that has ``address``."""
        return next((nic for nic in self.nics if address in nic.addresses), None)
