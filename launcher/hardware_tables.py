"""What `evermesh nodes` and `evermesh doctor` say of cards, GPUs, racks and settings."""

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.table import Table

from evermesh.fault.hardware.model import FoundNic, NodeHardware
from evermesh.fault.health.verdicts import Verdict
from evermesh.launcher.controller.status import NodeStatus

_BITS = 8


def in_short(hardware: NodeHardware | None) -> str:
    """Cards that are up, GPUs and rack, in a few words; without the loopback."""
    if hardware is None:
        return ""
    cards = Counter(
        f"{nic.nic_class}{_speed(nic)}" for nic in hardware.nics if nic.is_up and nic.nic_class != "loopback"
    )
    gpus = Counter(gpu.name for gpu in hardware.gpus)
    parts = [_times(number, what) for of_kind in (cards, gpus) for what, number in of_kind.items()]
    return ", ".join([*parts, *([f"rack {hardware.rack}"] if hardware.rack else [])])


def settings_table(nodes: Sequence[NodeStatus]) -> Table:
    """Every variable that ranks of a node are given, and why."""
    table = Table("node", "variable", "value", "because", box=None, header_style="bold", pad_edge=False)
    for node in nodes:
        for number, one in enumerate(node.settings):
            table.add_row(node.node if number == 0 else "", one.name, one.value, one.because)
    return table


def hardware_verdicts(hardware: NodeHardware) -> Iterator[Verdict]:
    """Every card and GPU, and the rack, as findings of the doctor: facts, none of which is bad by itself."""
    for nic in hardware.nics:
        yield Verdict(f"card {nic.rdma or nic.name}", "ok", ", ".join(_of_card(nic)))
    for gpu in hardware.gpus:
        peers = f"NVLink to {', '.join(map(str, gpu.nvlink_peers))}" if gpu.nvlink_peers else "no NVLink"
        near = f"nearest card {', '.join(gpu.near)}" if gpu.near else "no card near"
        yield Verdict(f"GPU {gpu.index}", "ok", f"{gpu.name}, PCIe {gpu.pci}{_numa(gpu.numa)}, {peers}, {near}")
    told = f"{hardware.rack} ({hardware.rack_from})" if hardware.rack else "not told; EVERMESH_RACK would"
    yield Verdict("rack", "ok", told)


def _of_card(nic: FoundNic) -> Iterator[str]:
    yield f"{nic.nic_class}{_speed(nic)}, {'up' if nic.is_up else 'down'}"
    if nic.rdma is not None and nic.name != nic.rdma:
        yield f"interface {nic.name}"
    yield from nic.addresses
    if nic.pci:
        yield f"PCIe {nic.pci}{_numa(nic.numa)}"


def _speed(nic: FoundNic) -> str:
    return f" {nic.bytes_per_s * _BITS / 1e9:g} Gbit/s" if nic.bytes_per_s else ""


def _numa(numa: int | None) -> str:
    return "" if numa is None else f", NUMA node {numa}"


def _times(number: int, what: str) -> str:
    return what if number == 1 else f"{number} x {what}"
