"""What one device can do, as the search for a layout sees it; imports no torch."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from evermesh.parallelism.topology import Nic, Node, Topology

_GIB = 2**30
DeviceName = Literal["h100", "h200", "a100", "cpu"]


class Device(BaseModel):
    """Sustained rates of one device; measured ones make every prediction better."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    peak_flops_per_s: PositiveFloat
    """What the maker promises for dense products of bfloat16; the model FLOPs utilisation (MFU) is a share of it."""
    flops_per_s: PositiveFloat
    """Of large matrix products."""
    attention_flops_per_s: PositiveFloat
    """Of fused attention, causal pairs only."""
    memory_bytes: PositiveInt
    reserve_bytes: NonNegativeInt = 0
    """Of it, for contexts, buffers of the communication library and fragments."""
    memory_bytes_per_s: PositiveFloat
    """Of device memory: what an update of the optimizer is bound by."""
    host_bytes_per_s: PositiveFloat
    """To host memory and back, each way."""
    host_memory_bytes: PositiveInt | None = 128 * _GIB
    """Host memory that belongs to a device, for offloaded activations; None: it has no other than its own."""
    layer_s: NonNegativeFloat = 0.0
    """Fixed seconds of one layer for one micro-batch, forward and backward: launches of kernels."""
    hop_s: NonNegativeFloat = 0.0
    """Fixed seconds of one step of a collective, of which one among n ranks has n - 1."""
    overlap_loss: NonNegativeFloat = 0.0
    """Seconds of computation that one second of traffic behind it costs: both use the same memory and cores."""
    link_bytes_per_s: PositiveFloat
    """Between two devices of a node, where no topology is given."""
    network_bytes_per_s: PositiveFloat
    """Of the network card that belongs to a device, where no topology is given."""
    fused_norms: bool = True
    """See ``Precision.fused_norms``."""

    def topology(self, nodes: int, devices: int) -> Topology:
        """So many nodes with so many of these devices, each with a card on a rail of its own."""
        nics = tuple(
            Nic(name=f"nic{index}", nic_class="infiniband", bytes_per_s=self.network_bytes_per_s, rail=index)
            for index in range(devices)
        )
        return Topology(
            nodes=tuple(
                Node(
                    name=f"node{index}",
                    devices=devices,
                    device_kind=self.name,
                    nics=nics,
                    intra_bytes_per_s=self.link_bytes_per_s,
                )
                for index in range(nodes)
            )
        )


_GPU: dict[str, Any] = {"reserve_bytes": 6 * _GIB, "layer_s": 60e-6, "hop_s": 4e-6, "overlap_loss": 0.15}
DEVICES: dict[DeviceName, Device] = {
    "h100": Device(
        name="h100",
        peak_flops_per_s=989e12,
        flops_per_s=600e12,
        attention_flops_per_s=400e12,
        memory_bytes=80 * _GIB,
        memory_bytes_per_s=2.6e12,
        host_bytes_per_s=50e9,
        link_bytes_per_s=300e9,
        network_bytes_per_s=45e9,
        **_GPU,
    ),
    "h200": Device(
        name="h200",
        peak_flops_per_s=989e12,
        flops_per_s=600e12,
        attention_flops_per_s=400e12,
        memory_bytes=139 * _GIB,
        memory_bytes_per_s=3.8e12,
        host_bytes_per_s=50e9,
        link_bytes_per_s=300e9,
        network_bytes_per_s=45e9,
        **_GPU,
    ),
    "a100": Device(
        name="a100",
        peak_flops_per_s=312e12,
        flops_per_s=220e12,
        attention_flops_per_s=150e12,
        memory_bytes=80 * _GIB,
        memory_bytes_per_s=1.6e12,
        host_bytes_per_s=24e9,
        link_bytes_per_s=200e9,
        network_bytes_per_s=23e9,
        **_GPU,
    ),
    "cpu": Device(
        name="cpu",
        peak_flops_per_s=70e9,
        flops_per_s=55e9,
        attention_flops_per_s=55e9,
        memory_bytes=8 * _GIB,
        memory_bytes_per_s=10e9,
        host_bytes_per_s=10e9,
        layer_s=1.1e-3,
        hop_s=1e-4,
        overlap_loss=1.0,
        host_memory_bytes=None,
        link_bytes_per_s=1e9,
        network_bytes_per_s=1e9,
        fused_norms=False,
    ),
}
"""Peaks and sizes are the makers'; the other rates are what good kernels and libraries reach on large problems: nominal, not
measured here. The CPU is one thread of a server, measured."""

__all__ = ["DEVICES", "Device", "DeviceName"]
