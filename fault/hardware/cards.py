"""Network cards from the files of ``/sys``; ``find_nics`` is pure."""

from collections.abc import Iterator, Mapping, Sequence

from evermesh.fault.hardware.model import FoundNic
from evermesh.fault.health.host.files import Files, names, number
from evermesh.fault.health.host.network import gbit, word

_NET, _IB = "sys/class/net", "sys/class/infiniband"
_INTERFACE = ("type", "carrier", "speed", "device/uevent", "device/numa_node", "master/uevent", "bonding/slaves")
_DEVICE = ("device/uevent", "device/numa_node", "device/net/*/dev_port", *(f"ports/*/{k}" for k in ("state", "rate")))
PATTERNS = (
    *(f"{_NET}/*/{key}" for key in _INTERFACE),
    *(f"{_IB}/*/{key}" for key in (*_DEVICE, "ports/*/link_layer")),
)
"""The files that ``find_nics`` looks at."""
_LOOPBACK = 772
"""``ARPHRD_LOOPBACK`` in ``type``."""
_BITS = 8


def find_nics(files: Files, addresses: Mapping[str, Sequence[str]]) -> tuple[FoundNic, ...]:
    """Every RDMA port, and every other interface that is a device, a bond, or has an address; ``addresses`` by interface.

    Interfaces that are parts of a bond are left out: the bond is there.
    """
    ports = tuple(_rdma_ports(files, addresses))
    taken = {nic.name for nic in ports}
    wanted = [
        name
        for name in names(files, _NET)
        if name not in taken
        and f"{_NET}/{name}/master/uevent" not in files
        and (addresses.get(name) or any(f"{_NET}/{name}/{key}" in files for key in ("device/uevent", "bonding/slaves")))
    ]
    return (*ports, *(_interface(files, name, addresses) for name in wanted))


def _interface(files: Files, name: str, addresses: Mapping[str, Sequence[str]]) -> FoundNic:
    folder = f"{_NET}/{name}"
    speed = number(files, f"{folder}/speed") or 0
    return FoundNic(
        name=name,
        nic_class="loopback" if number(files, f"{folder}/type") == _LOOPBACK else "ethernet",
        is_up=bool(number(files, f"{folder}/carrier")),
        bytes_per_s=speed * 1e6 / _BITS if speed > 0 else None,
        addresses=tuple(addresses.get(name, ())),
        pci=_pci(files, folder),
        numa=_numa(files, folder),
    )


def _rdma_ports(files: Files, addresses: Mapping[str, Sequence[str]]) -> Iterator[FoundNic]:
    for device in names(files, _IB):
        folder = f"{_IB}/{device}"
        interfaces = {
            (number(files, f"{folder}/device/net/{name}/dev_port") or 0) + 1: name
            for name in names(files, f"{folder}/device/net")
        }
        for port in names(files, f"{folder}/ports"):
            of_port = f"{folder}/ports/{port}"
            interface = interfaces.get(int(port))
            rate = gbit(files.get(f"{of_port}/rate", ""))
            is_infiniband = files.get(f"{of_port}/link_layer", "").strip() == "InfiniBand"
            yield FoundNic(
                name=interface or device,
                nic_class="infiniband" if is_infiniband else "roce",
                is_up=word(files, f"{of_port}/state") == "ACTIVE",
                bytes_per_s=rate * 1e9 / _BITS if rate > 0 else None,
                addresses=tuple(addresses.get(interface or "", ())),
                rdma=device,
                port=int(port),
                pci=_pci(files, folder),
                numa=_numa(files, folder),
            )


def _pci(files: Files, folder: str) -> str:
    lines = files.get(f"{folder}/device/uevent", "").splitlines()
    return next((line.partition("=")[2].lower() for line in lines if line.startswith("PCI_SLOT_NAME=")), "")


def _numa(files: Files, folder: str) -> int | None:
    """None where the machine has no NUMA nodes, of which the kernel says -1."""
    found = number(files, f"{folder}/device/numa_node")
    return found if found is not None and found >= 0 else None
