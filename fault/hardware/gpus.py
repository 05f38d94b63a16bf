"""GPUs as the driver tells them, and which network cards are nearest to each; nothing where there is no driver."""

import importlib
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evermesh.fault.hardware.model import FoundGpu, FoundNic
from evermesh.fault.health.gpu.reading import session, text

_NVLINK = 2
"""``NVML_P2P_CAPS_INDEX_NVLINK``."""
_OK = 0
_PCI_DEVICES = "sys/bus/pci/devices"


def find_gpus(nvml: Any = None, root: Path = Path("/")) -> tuple[FoundGpu, ...]:
    """Ask the driver; ``near`` is left to ``with_nearest``. ``nvml`` has the functions of ``pynvml``; None: that module."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return ()
    try:
        with session(nvml):
            handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
            return tuple(_gpu(nvml, index, handles, root) for index in range(len(handles)))
    except nvml.NVMLError:  # health checks tell why
        return ()


def with_nearest(gpus: Sequence[FoundGpu], nics: Sequence[FoundNic], root: Path = Path("/")) -> tuple[FoundGpu, ...]:
    """The same, each with the cards that share most of its way through PCIe: those under the same switch, else those of the
    same root, else of the same NUMA node. RDMA devices where any is up, else other cards that are up."""
    usable = [nic for nic in nics if nic.is_up and nic.pci]
    usable = [nic for nic in usable if nic.is_rdma] or usable
    addresses = {*(gpu.pci for gpu in gpus if gpu.pci), *(nic.pci for nic in usable)}
    ways = {address: _way(root, address) for address in addresses}
    return tuple(replace(gpu, near=_nearest(gpu, usable, ways)) for gpu in gpus)


def _gpu(nvml: Any, index: int, handles: Sequence[Any], root: Path) -> FoundGpu:
    own = handles[index]
    pci = _ask(nvml, "nvmlDeviceGetPciInfo", own)
    address = _sysfs(text(pci.busId)) if pci else ""
    peers = (
        other
        for other, handle in enumerate(handles)
        if other != index and _ask(nvml, "nvmlDeviceGetP2PStatus", own, handle, _NVLINK) == _OK
    )
    name = text(_ask(nvml, "nvmlDeviceGetName", own) or "")
    return FoundGpu(index=index, name=name, pci=address, numa=_numa(root, address), nvlink_peers=tuple(peers))


def _ask(nvml: Any, function: str, *arguments: Any) -> Any:
    try:
        return getattr(nvml, function)(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None


def _sysfs(bus: str) -> str:
    """``0000:3b:00.0`` of ``00000000:3B:00.0``: the kernel writes domains with four digits."""
    domain, _, rest = bus.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}" if rest else bus.lower()


def _numa(root: Path, address: str) -> int | None:
    try:
        found = int((root / _PCI_DEVICES / address / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return found if found >= 0 else None


def _way(root: Path, address: str) -> tuple[str, ...]:
    """The bridges from the root of PCIe to a device."""
    found = Path(os.path.realpath(root / _PCI_DEVICES / address)).parts
    return tuple(part for part in found if ":" in part)[:-1]


def _nearest(gpu: FoundGpu, nics: Sequence[FoundNic], ways: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    if not gpu.pci or not nics:
        return ()
    shared = {nic: _in_common(ways[gpu.pci], ways[nic.pci]) for nic in nics}
    most = max(shared.values())
    same_numa = [nic for nic in nics if gpu.numa is not None and nic.numa == gpu.numa]
    near = [nic for nic in nics if shared[nic] == most] if most else same_numa
    return tuple(nic.rdma or nic.name for nic in near)


def _in_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Bridges that two ways begin with."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)
