"""Recorded machines: files of ``/sys`` written to a folder, and GPUs that answer in place of a driver."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.fault.health.fake_nvml import FakeNvml, NVMLError


def write(root: Path, files: Mapping[str, str]) -> None:
    """Write files below ``root``."""
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content + "\n")


def device(root: Path, way: str, numa: int) -> str:
    """A PCIe device behind the bridges of ``way``; returns its address."""
    folder = root / "sys/devices" / way
    write(folder, {"uevent": f"DRIVER=x\nPCI_SLOT_NAME={folder.name}", "numa_node": str(numa)})
    link = root / "sys/bus/pci/devices" / folder.name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(folder)
    return folder.name


def link_device(root: Path, of: str, address: str) -> None:
    """Let ``of``, an interface or an RDMA device, belong to a PCIe device."""
    folder = root / "sys/class" / of
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "device").symlink_to((root / "sys/bus/pci/devices" / address).resolve())


def rdma(root: Path, name: str, address: str, *, interface: str = "", **port: str) -> None:
    """An adapter with one port, ACTIVE at 400 Gb/s over InfiniBand unless said otherwise."""
    told = {"state": "4: ACTIVE", "rate": "400 Gb/sec (4X NDR)", "link_layer": "InfiniBand", **port}
    link_device(root, f"infiniband/{name}", address)
    write(root / f"sys/class/infiniband/{name}/ports/1", told)
    if interface:
        write(root / f"sys/class/infiniband/{name}/device/net/{interface}", {"dev_port": "0"})
        write(root / f"sys/class/net/{interface}", {"type": "32", "carrier": "1"})


def dgx(root: Path) -> Any:
    """Two switches of PCIe with a GPU and a card each, an Ethernet card, a bond of two; returns its NVML."""
    gpus = [device(root, f"pci0000:{r}0/0000:{r}0:01.0/0000:{r}1:00.0/0000:{r}2:00.0", r - 1) for r in (1, 2)]
    cards = [device(root, f"pci0000:{r}0/0000:{r}0:01.0/0000:{r}1:10.0/0000:{r}3:00.0", r - 1) for r in (1, 2)]
    socket = device(root, "pci0000:30/0000:30:01.0/0000:31:00.0", 0)
    rdma(root, "mlx5_0", cards[0], interface="ibs0")
    rdma(root, "mlx5_1", cards[1], rate="200 Gb/sec (2X NDR)")
    link_device(root, "net/eth0", socket)
    write(root / "sys/class/net/eth0", {"type": "1", "carrier": "1", "speed": "25000"})
    write(root / "sys/class/net/lo", {"type": "772", "carrier": "1"})
    write(root / "sys/class/net/dummy0", {"type": "1", "carrier": "1"})
    write(root / "sys/class/net/bond0", {"type": "1", "carrier": "1", "speed": "200000", "bonding/slaves": "a b"})
    write(
        root / "sys/class/net/a", {"type": "1", "carrier": "1", "speed": "100000", "master/uevent": "INTERFACE=bond0"}
    )
    return FakeNvml(*(_gpu(address, number) for number, address in enumerate(gpus)))


def _gpu(address: str, number: int) -> dict[str, Any]:
    """All GPUs are joined by NVLink."""
    answers: dict[str, Any] = {
        "Name": b"NVIDIA H100 80GB HBM3",
        "PciInfo": SimpleNamespace(busId=f"0000{address}".upper().encode()),
        "number": number,
    }
    answers["P2PStatus"] = lambda other, index: 0 if index == 2 and other["number"] != number else NVMLError("no")
    return answers
