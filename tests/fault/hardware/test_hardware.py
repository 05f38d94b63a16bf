"""What is found out about cards, GPUs and racks: of recorded machines, and of this one."""

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from pydantic import TypeAdapter

from evermesh.fault.hardware.cards import PATTERNS, find_nics
from evermesh.fault.hardware.gpus import find_gpus, with_nearest
from evermesh.fault.hardware.looking import look_at_hardware
from evermesh.fault.hardware.model import NodeHardware
from evermesh.fault.hardware.rack import find_rack
from evermesh.fault.health.host.files import read_files
from tests.fault.hardware.machines import device, dgx, link_device, rdma, write

ADDRESSES = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.7", "fe80::1"], "ibs0": ["192.168.0.7"]}


def test_cards_of_a_recorded_machine_have_class_speed_address_and_place(tmp_path: Path) -> None:
    dgx(tmp_path)
    nics = find_nics(read_files(PATTERNS, tmp_path), ADDRESSES)
    told = [(nic.name, nic.nic_class, nic.rdma, nic.bytes_per_s, nic.addresses, nic.pci, nic.numa) for nic in nics]
    assert told == [
        ("ibs0", "infiniband", "mlx5_0", 50e9, ("192.168.0.7",), "0000:13:00.0", 0),
        ("mlx5_1", "infiniband", "mlx5_1", 25e9, (), "0000:23:00.0", 1),
        ("bond0", "ethernet", None, 25e9, (), "", None),
        ("eth0", "ethernet", None, 3.125e9, ("10.0.0.7", "fe80::1"), "0000:31:00.0", 0),
        ("lo", "loopback", None, None, ("127.0.0.1",), "", None),
    ]
    assert all(nic.is_up for nic in nics)
    found = NodeHardware(nics=nics)
    assert found.interface_of("10.0.0.7") == nics[3]
    adapter = TypeAdapter(NodeHardware)
    assert adapter.validate_json(adapter.dump_json(found)) == found


@pytest.mark.parametrize(
    ("port", "nic_class", "is_up"),
    [
        ({}, "infiniband", True),
        ({"link_layer": "Ethernet"}, "roce", True),
        ({"state": "1: DOWN"}, "infiniband", False),
        ({"state": "2: INIT"}, "infiniband", False),
    ],
)
def test_a_port_that_is_not_active_is_not_up(tmp_path: Path, port: dict[str, str], nic_class: str, is_up: bool) -> None:
    rdma(tmp_path, "mlx5_0", device(tmp_path, "pci0000:10/0000:10:00.0", -1), **port)
    [nic] = find_nics(read_files(PATTERNS, tmp_path), {})
    assert (nic.nic_class, nic.is_up, nic.numa) == (nic_class, is_up, None)


def test_a_card_without_carrier_or_speed_says_so(tmp_path: Path) -> None:
    link_device(tmp_path, "net/eth0", device(tmp_path, "pci0000:10/0000:10:00.0", 0))
    write(tmp_path / "sys/class/net/eth0", {"type": "1", "carrier": "0", "speed": "-1"})
    [nic] = find_nics(read_files(PATTERNS, tmp_path), {})
    assert (nic.is_up, nic.bytes_per_s) == (False, None)


def test_gpus_know_their_nvlink_peers_and_the_card_under_their_switch(tmp_path: Path) -> None:
    nvml = dgx(tmp_path)
    nics = find_nics(read_files(PATTERNS, tmp_path), ADDRESSES)
    gpus = with_nearest(find_gpus(nvml, tmp_path), nics, tmp_path)
    assert [(gpu.pci, gpu.numa, gpu.nvlink_peers, gpu.near) for gpu in gpus] == [
        ("0000:12:00.0", 0, (1,), ("mlx5_0",)),
        ("0000:22:00.0", 1, (0,), ("mlx5_1",)),
    ]
    assert nvml.is_open == 0
    without = [replace(nic, is_up=nic.rdma != "mlx5_1") for nic in nics]
    assert [gpu.near for gpu in with_nearest(gpus, without, tmp_path)] == [("mlx5_0",), ()]
    sockets = [nic for nic in nics if not nic.is_rdma]
    assert [gpu.near for gpu in with_nearest(gpus, sockets, tmp_path)] == [("eth0",), ()]  # of the same NUMA node


def test_a_machine_without_a_driver_has_no_gpus(tmp_path: Path) -> None:
    nvml = dgx(tmp_path)
    nvml.starts = False
    assert find_gpus(nvml, tmp_path) == ()


SLURM = {"SLURM_TOPOLOGY_ADDR": "s0.s2.tux7", "SLURM_TOPOLOGY_ADDR_PATTERN": "switch.switch.node"}
FLAT = {"SLURM_TOPOLOGY_ADDR": "tux7", "SLURM_TOPOLOGY_ADDR_PATTERN": "node"}


@pytest.mark.parametrize(
    ("environ", "labels", "rack", "told_by"),
    [
        ({}, {}, None, ""),
        (SLURM, {"rack": "r9"}, "s2", "SLURM_TOPOLOGY_ADDR"),
        (SLURM | {"SLURM_TOPOLOGY_ADDR": "s0.s2.tux7.example.org"}, {}, "s2", "SLURM_TOPOLOGY_ADDR"),
        (SLURM | {"EVERMESH_RACK": "r1"}, {}, "r1", "EVERMESH_RACK"),
        (FLAT, {}, None, ""),
        (FLAT, {"rack": "r9", "zone": "a"}, "r9", "label rack"),
        ({}, {"topology.kubernetes.io/rack": "r3"}, "r3", "label topology.kubernetes.io/rack"),
    ],
)
def test_the_rack_is_what_people_slurm_or_labels_say(
    environ: dict[str, str], labels: dict[str, str], rack: str | None, told_by: str
) -> None:
    assert find_rack(environ, labels) == (rack, told_by)


def test_this_machine_is_found_as_other_programs_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERMESH_RACK", "r7")
    found = look_at_hardware()
    assert (found.rack, found.rack_from) == ("r7", "EVERMESH_RACK")
    loopback = found.interface_of("127.0.0.1")
    assert loopback is not None
    assert loopback.nic_class == "loopback"
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    with_address = {name for name, of_name in psutil.net_if_addrs().items() if any(one.family == 2 for one in of_name)}
    assert up & with_address <= {nic.name for nic in found.nics if nic.is_up}
    assert all(nic.rdma is None for nic in found.nics) or Path("/sys/class/infiniband").is_dir()
