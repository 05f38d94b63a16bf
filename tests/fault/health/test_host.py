"""Checks of the host, on text as kernels write it, and on the files of this machine."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from evermesh.fault.health.host import load, memory, network
from evermesh.fault.health.host.clock import ClockState, judge_clock, read_clock
from evermesh.fault.health.host.disks import DiskReading, judge_disk, judge_shared_memory, read_disk
from evermesh.fault.health.host.files import Files, Look, read_files
from evermesh.fault.health.host.kernel_log import KernelLog, judge_log, parse
from evermesh.fault.health.looking import Watch, clock
from evermesh.fault.health.verdicts import Verdict, changed, exit_code, worst

MEMINFO = (
    "MemTotal:       24684084 kB\nMemFree:         240724 kB\nMemAvailable:   {} kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n"
)


@pytest.mark.parametrize(("available_kb", "state"), [(22457648, "ok"), (1000000, "warn"), (200000, "bad")])
def test_memory_is_judged_by_what_is_available(available_kb: int, state: str) -> None:
    [found] = memory.judge_available(Look({"proc/meminfo": MEMINFO.format(available_kb)}))
    assert found.state == state
    assert found.numbers["available_bytes"] == available_kb * 1024


def test_a_container_has_the_memory_of_its_control_group_without_caches() -> None:
    files = {
        "proc/meminfo": MEMINFO.format(22457648),
        "sys/fs/cgroup/memory.max": "1073741824\n",
        "sys/fs/cgroup/memory.current": "1063741824\n",
        "sys/fs/cgroup/memory.stat": "anon 1\ninactive_file 20000000\n",
    }
    [found] = memory.judge_available(Look(files))
    assert found.state == "warn"
    assert found.numbers["available_bytes"] == 1073741824 - 1043741824
    unlimited = files | {"sys/fs/cgroup/memory.max": "max\n"}
    assert memory.judge_available(Look(unlimited))[0].state == "ok"


def test_processes_killed_since_the_first_look_are_a_warning_and_older_ones_are_not() -> None:
    first, now = ({"proc/vmstat": f"pgfault 1\noom_kill {count}\n"} for count in (3, 5))
    assert memory.judge_killed(Look(first))[0].state == "ok"
    [found] = memory.judge_killed(Look(now, first, first))
    assert (found.state, found.numbers["kills"]) == ("warn", 2)


def test_uncorrected_memory_errors_are_bad_and_many_corrected_ones_a_warning() -> None:
    def counted(corrected: int, uncorrected: int) -> Files:
        folder = "sys/devices/system/edac/mc/mc0"
        return {f"{folder}/ce_count": f"{corrected}\n", f"{folder}/ue_count": f"{uncorrected}\n"}

    states = [memory.judge_errors(Look(counted(*now)))[0].state for now in ((0, 0), (10, 0), (5000, 0), (0, 1))]
    assert states == ["ok", "ok", "warn", "bad"]
    assert memory.judge_errors(Look(counted(5000, 0), counted(4990, 0)))[0].state == "ok"
    assert "not readable" in memory.judge_errors(Look({}))[0].reason


def interface(**told: object) -> Files:
    values = {"flags": "0x1003", "carrier": 1, "carrier_changes": 2, "speed": 25000, "device/uevent": "DRIVER=mlx5"}
    values |= {f"statistics/{way}_{kind}": 0 for way in ("rx", "tx") for kind in ("errors", "dropped")}
    values |= {"statistics/rx_packets": 10**6, "statistics/tx_packets": 10**6}
    return {f"sys/class/net/eth0/{name}": f"{value}\n" for name, value in (values | told).items()}


@pytest.mark.parametrize(
    ("now", "state", "told"),
    [
        ({}, "ok", "25,000 Mbit/s"),
        ({"carrier": 0}, "bad", "was up before"),
        ({"carrier_changes": 6}, "warn", "4 changes"),
        ({"speed": 1000}, "warn", "ran at 25,000"),
        ({"statistics/rx_errors": 500, "statistics/rx_packets": 2 * 10**6}, "warn", "500 were wrong"),
        ({"statistics/rx_dropped": 500, "statistics/rx_packets": 2 * 10**6}, "ok", "up"),
        ({"statistics/rx_errors": 50, "statistics/rx_packets": 10**6 + 60}, "ok", "50 wrong"),
    ],
)
def test_a_link_is_compared_with_itself_at_the_first_look(now: dict[str, object], state: str, told: str) -> None:
    [found] = network.judge_interfaces(Look(interface(**now), interface(), interface()))
    assert found.state == state, found
    assert told in found.reason


def test_a_link_that_was_never_up_is_no_reason_to_refuse_a_node() -> None:
    assert network.judge_interfaces(Look(interface(carrier=0)))[0].state == "warn"
    assert "no interface" in network.judge_interfaces(Look(interface(flags="0x1002")))[0].reason  # switched off


def port(state: str = "4: ACTIVE", rate: str = "400 Gb/sec (4X NDR)", downed: int = 0) -> dict[str, str]:
    folder = "sys/class/infiniband/mlx5_0/ports/1"
    told = {"state": state, "phys_state": "5: LinkUp", "rate": rate, "counters/link_downed": downed}
    return {f"{folder}/{name}": f"{value}\n" for name, value in told.items()}


def test_infiniband_ports_are_judged_by_state_rate_and_counters() -> None:
    assert network.judge_infiniband(Look({}))[0].reason == "there is none"
    now = [port(), port("1: DOWN"), port(rate="100 Gb/sec (4X EDR)"), port(downed=1)]
    found = [network.judge_infiniband(Look(files, port(), port()))[0] for files in now]
    assert [verdict.state for verdict in found] == ["ok", "bad", "warn", "warn"]
    assert "was ACTIVE before" in found[1].reason
    assert network.judge_infiniband(Look(port("1: DOWN")))[0].state == "bad"
    assert network.judge_infiniband(Look(port("1: DOWN") | {_physical(): "2: Polling"}))[0].state == "warn"


def _physical() -> str:
    return "sys/class/infiniband/mlx5_0/ports/1/phys_state"


def test_a_process_that_waits_for_a_device_at_two_looks_is_stuck() -> None:
    def processes(letter: str, start: int = 77) -> Files:
        return {"proc/12/stat": f"12 (a (b) c) {letter} 1 " + " ".join(["0"] * 17) + f" {start} 0\n"}

    stuck = load.judge_processes(Look(processes("D"), None, processes("D")))[0]
    assert (stuck.state, stuck.numbers["stuck"]) == ("warn", 1)
    assert "a (b) c" in stuck.reason
    assert load.judge_processes(Look(processes("D")))[0].state == "ok"
    assert load.judge_processes(Look(processes("D"), None, processes("S")))[0].state == "ok"
    assert load.judge_processes(Look(processes("D", 99), None, processes("D")))[0].state == "ok"  # another life


def test_pressure_load_and_limits_are_read_as_the_kernel_writes_them() -> None:
    pressure = "some avg10=0.00 avg60=3.00 avg300=0.00 total=9\nfull avg10=0.00 avg60={} avg300=0.00 total=5\n"
    assert load.judge_pressure(Look({"proc/pressure/memory": pressure.format("0.50")}))[0].state == "ok"
    assert load.judge_pressure(Look({"proc/pressure/memory": pressure.format("22.75")}))[0].state == "warn"
    assert "not readable" in load.judge_pressure(Look({}))[0].reason
    [found] = load.judge_load(
        Look({"proc/loadavg": "3.71 2.46 2.01 8/101 9587\n", "sys/devices/system/cpu/online": "0-3,8\n"})
    )
    assert found.numbers == {"load_1min": 3.71, "load_5min": 2.46, "processors": 5}
    limits = "Limit  Soft  Hard  Units\nMax open files            {}                 20000                files\n"
    assert load.judge_file_limit(Look({"proc/self/limits": limits.format(1024)}))[0].state == "warn"
    assert load.judge_file_limit(Look({"proc/self/limits": limits.format(65536)}))[0].state == "ok"


def test_a_full_disk_is_a_warning_and_a_broken_one_is_bad() -> None:
    def judged(found: DiskReading) -> str:
        return judge_disk("the run", Path("/x"), found).state

    assert judged(DiskReading(80 << 30, 100 << 30, False, 0.01)) == "ok"
    assert judged(DiskReading(1 << 30, 100 << 30, False, 0.01)) == "warn"
    assert judged(DiskReading(80 << 30, 100 << 30, False, 4.0)) == "warn"
    assert judged(DiskReading(0, 100 << 30, False, error=OSError(errno.ENOSPC, "No space left"))) == "warn"
    assert judged(DiskReading(80 << 30, 100 << 30, False, error=OSError(errno.EIO, "Input/output error"))) == "bad"
    assert judged(DiskReading(80 << 30, 100 << 30, True)) == "bad"
    assert judge_shared_memory(DiskReading(60 << 20, 64 << 20, False)).state == "warn"


def test_reading_a_disk_writes_to_it_and_leaves_nothing(tmp_path: Path) -> None:
    found = read_disk(tmp_path)
    assert found.write_s is not None
    assert found.write_s > 0
    assert list(tmp_path.iterdir()) == []
    assert judge_disk("x", tmp_path / "gone", read_disk(tmp_path / "gone")).state == "warn"


def test_a_mount_that_is_read_only_is_found(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path; from evermesh.fault.health.host.disks import *; "
        "folder = Path(sys.argv[1]); print(judge_disk('it', folder, read_disk(folder)).state)"
    )
    mount = f'mount -t tmpfs -o ro none {tmp_path} && exec {sys.executable} -c "import sys; {program}" {tmp_path}'
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", mount], capture_output=True, text=True, check=False)
    if done.returncode and "Operation not permitted" in done.stderr:
        pytest.skip("mounting is not permitted here (unshare -Urm)")
    assert done.stdout.split() == ["bad"], done.stderr


def test_the_clock_is_judged_by_the_kernel_and_the_kernel_answers_here() -> None:
    assert judge_clock(ClockState(False, 0.0, 16.0), []).state == "warn"
    assert judge_clock(ClockState(True, 0.3, 0.5), ["chrony"]).state == "warn"
    assert judge_clock(ClockState(True, 1e-5, 0.01), ["chrony"]).state == "ok"
    state = read_clock()
    assert state is None or 0 <= state.max_error_s < 3600
    assert clock().check == "clock"


def test_faults_are_found_in_the_kernel_log() -> None:
    records = (
        "6,1,1000000,-;usb 1-1: new device\n SUBSYSTEM=usb\n",
        "3,2,2000000,-;blk_update_request: I/O error, dev nvme0n1, sector 12345",
        "3,3,3000000,-;EXT4-fs error (device nvme0n1p1): ext4_find_entry",
        "3,4,4000000,-;Out of memory: Killed process 4711 (python3) total-vm:1kB",
    )
    lines = [line for record in records if (line := parse(record))]
    assert [line.since_boot_s for line in lines] == [1.0, 2.0, 3.0, 4.0]
    found = {verdict.check: verdict for verdict in judge_log(lines)}
    assert {check for check, verdict in found.items() if verdict.state == "warn"} == {
        "kernel log: disk",
        "kernel log: file system",
    }
    assert "python3" in found["kernel log"].reason
    assert parse("not a record") is None


def test_a_log_that_may_not_be_read_is_no_failure(tmp_path: Path) -> None:
    log = KernelLog(str(tmp_path / "none"))
    assert log.read() == []
    [found] = judge_log([], log.why_not)
    assert found.state == "ok"
    assert "not readable" in found.reason


def test_a_watch_reads_this_machine_twice_and_an_empty_one_without_failing(tmp_path: Path) -> None:
    watch = Watch({"the test": tmp_path})
    first, again = watch.look(), watch.look()
    assert [verdict.check for verdict in first] == [verdict.check for verdict in again]
    assert {"memory", "disk of the test", "OOM kills", "GPUs"} <= {verdict.check for verdict in again}
    empty = list(Watch(root=tmp_path).host())
    assert worst(verdict for verdict in empty if not verdict.check.startswith(("disk", "kernel", "shared"))) == "ok"
    assert sum("not readable" in verdict.reason for verdict in empty) >= 5


def test_files_that_cannot_be_read_are_missing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1\n")
    assert read_files(("a/*", "b/y", "a"), tmp_path) == {"a/x": "1\n"}


def test_only_states_that_changed_are_told() -> None:
    ok, warn, bad = (Verdict("a", state, "r") for state in ("ok", "warn", "bad"))
    assert changed({}, [ok]) == []
    assert changed({}, [bad]) == [bad]
    assert changed({"a": bad}, [bad]) == []
    assert changed({"a": bad}, [ok]) == [ok]
    assert changed({"a": warn}, [bad]) == [bad]
    assert changed({"a": ok}, []) == []
    assert [(found.check, found.state) for found in changed({"a": bad}, [])] == [("a", "ok")]
    assert [exit_code(found) for found in ([], [ok], [ok, warn], [warn, bad])] == [0, 0, 1, 2]
