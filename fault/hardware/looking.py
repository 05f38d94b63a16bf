"""Looking at the hardware of this node."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from evermesh.fault.hardware.cards import PATTERNS, find_nics
from evermesh.fault.hardware.gpus import with_nearest
from evermesh.fault.hardware.model import FoundGpu, NodeHardware
from evermesh.fault.hardware.rack import find_rack
from evermesh.fault.health.host.files import read_files


def look_at_hardware(labels: Mapping[str, str] | None = None, root: Path = Path("/")) -> NodeHardware:
    """The network cards and the rack of this node, in milliseconds. GPUs are asked elsewhere: a driver may never answer."""
    addresses = {
        name: [found.address for found in of_name if found.family.name in ("AF_INET", "AF_INET6")]
        for name, of_name in psutil.net_if_addrs().items()
    }
    rack, told_by = find_rack(os.environ, labels or {})
    return NodeHardware(nics=find_nics(read_files(PATTERNS, root), addresses), rack=rack, rack_from=told_by)


def with_gpus(hardware: NodeHardware, gpus: Sequence[FoundGpu], root: Path = Path("/")) -> NodeHardware:
    """The same node with its GPUs."""
    return replace(hardware, gpus=with_nearest(gpus, hardware.nics, root))
