"""Checks of GPUs, on a stand-in for the driver's library: there is none here, which the real library is asked about."""

import sys
from importlib.util import find_spec
from typing import Any

import pytest

from evermesh.fault.health.gpu.judging import judge_gpus
from evermesh.fault.health.gpu.reading import GpusReading, read_gpus
from evermesh.fault.health.gpu.xid import XIDS, judge_xids, xid_events
from evermesh.fault.health.host.kernel_log import LogLine
from evermesh.fault.health.verdicts import Verdict, worst
from tests.fault.health.fake_nvml import FakeNvml, NVMLError, healthy


def states(*gpus: dict[str, Any], first: GpusReading | None = None) -> dict[str, Verdict]:
    return {verdict.check: verdict for verdict in judge_gpus(read_gpus(FakeNvml(*gpus)), first)}


def test_without_a_driver_the_real_library_says_so_and_that_is_no_failure() -> None:
    reading = read_gpus()
    if reading.gpus:
        assert reading.driver
        return
    assert reading.why_none.startswith("no driver answers" if find_spec("pynvml") else "nvidia-ml-py is not installed")
    [found] = judge_gpus(reading)
    assert (found.check, found.state) == ("GPUs", "ok")


def test_without_the_library_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_gpus().why_none == "nvidia-ml-py is not installed"


def test_a_driver_that_does_not_start_is_told_and_the_session_is_always_closed() -> None:
    assert read_gpus(FakeNvml(starts=False)).why_none == "no driver answers (Driver Not Loaded)"
    nvml = FakeNvml(healthy(), healthy())
    assert len(read_gpus(nvml).gpus) == 2
    assert nvml.is_open == 0


def test_a_healthy_gpu_is_ok_and_every_number_is_there() -> None:
    found = states(healthy(), healthy())
    assert worst(found.values()) == "ok", found
    assert found["GPU 0 speed"].numbers["power_w"] == 612.0
    assert found["GPU 0 NVLink"].numbers["up"] == 18
    assert found["GPU 1"].reason == "NVIDIA H100 80GB HBM3 at 00000000:3b:00.0"
    assert found["GPUs"].reason == "2, driver 580.65"


def test_what_a_gpu_does_not_support_is_no_failure() -> None:
    found = states({"UUID": "GPU-0"})
    assert worst(found.values()) == "ok", found
    assert found["GPU 0 memory"].reason == "this GPU has no ECC, or it is off"
    assert "not supported" in found["GPU 0 PCIe"].reason
    assert "GPU 0 NVLink" not in found


def ecc(uncorrected: int, corrected: int = 0) -> Any:
    return lambda kind, counter: uncorrected if kind == 1 else corrected


@pytest.mark.parametrize(
    ("changes", "check", "state", "told"),
    [
        ({"TotalEccErrors": ecc(2)}, "memory", "bad", "2 errors could not be corrected"),
        ({"TotalEccErrors": ecc(0, 4000)}, "memory", "ok", "4,000 errors were corrected"),
        ({"RemappedRows": (3, 1, 1, 0)}, "memory", "warn", "waits for its replacement"),
        ({"RemappedRows": (3, 1, 0, 1)}, "memory", "bad", "could not be replaced"),
        ({"RetiredPages": lambda cause: [1] * 6}, "memory", "bad", "12 pages"),
        ({"RetiredPages": lambda cause: [1] * 5}, "memory", "ok", "none was left"),
        ({"CurrentClocksEventReasons": 0x48}, "speed", "warn", "hardware slowdown, hardware thermal slowdown"),
        ({"CurrentClocksEventReasons": 0x7}, "speed", "ok", "1755 MHz"),
        ({"Temperature": lambda sensor: 85}, "speed", "warn", "85 °C, and slows down at 87 °C"),
        ({"EnforcedPowerLimit": 400_000}, "speed", "warn", "400 of 700 W"),
        ({"CurrPcieLinkWidth": 8}, "PCIe", "warn", "8 of 16 lanes"),
        ({"CurrPcieLinkGeneration": 3}, "PCIe", "warn", "generation 3 of 5"),
        ({"CurrPcieLinkGeneration": 1, "PerformanceState": 8}, "PCIe", "ok", "generation 1"),
    ],
)
def test_one_thing_that_is_wrong_is_found_and_nothing_else(
    changes: dict[str, Any], check: str, state: str, told: str
) -> None:
    found = states(healthy(**changes), healthy())
    assert found[f"GPU 0 {check}"].state == state
    assert told in found[f"GPU 0 {check}"].reason
    others = [verdict for name, verdict in found.items() if name != f"GPU 0 {check}"]
    assert worst(others) == "ok", others


def test_the_old_name_of_the_reasons_for_low_clocks_is_asked_too() -> None:
    gpu = healthy(CurrentClocksThrottleReasons=0x80)
    del gpu["CurrentClocksEventReasons"]
    assert "power brake" in states(gpu)["GPU 0 speed"].reason


def test_links_and_gpus_that_were_there_are_missed() -> None:
    first = read_gpus(FakeNvml(healthy(), healthy()))
    fewer = healthy(NvLinkState=lambda link: int(link != 3) if link < 18 else NVMLError("Invalid Argument"))
    assert states(fewer, healthy(), first=first)["GPU 0 NVLink"].state == "bad"
    assert (
        states(fewer, healthy(), healthy())["GPU 0 NVLink"].state == "warn"
    )  # at the first look: its siblings have more
    counted = healthy(NvLinkErrorCounter=lambda link, counter: int(counter == 1 and link == 5))
    assert states(counted, healthy(), first=first)["GPU 0 NVLink"].state == "warn"
    lost = states(healthy(), first=first)
    assert lost["GPUs"].state == "bad"
    assert lost["GPUs"].reason.startswith("1 of 2 GPUs are left")


def test_a_gpu_that_does_not_answer_is_bad_and_the_others_are_looked_at() -> None:
    found = states({"UUID": NVMLError("GPU is lost")}, healthy())
    assert (found["GPU 0"].state, found["GPU 0"].reason) == ("bad", "does not answer: GPU is lost")
    assert found["GPU 1 memory"].state == "ok"


def log(number: int, since_boot_s: float = 50.0) -> LogLine:
    return LogLine(since_boot_s, f"NVRM: Xid (PCI:0000:3B:00): {number}, pid=4711, name=python, and so on")


def test_xids_are_read_in_both_forms_of_the_driver() -> None:
    old = LogLine(7.0, "NVRM: Xid (0000:03:00): 31, Ch 00000008")
    found = xid_events([old, log(79), LogLine(8.0, "NVRM: loading driver")])
    assert [(event.bus, event.number) for event in found] == [("0000:03:00", 31), ("0000:3b:00", 79)]


@pytest.mark.parametrize(
    ("number", "before", "later"),
    [(79, "bad", "bad"), (48, "warn", "bad"), (63, "warn", "warn"), (31, "ok", "warn"), (4711, "warn", "warn")],
)
def test_what_an_xid_means_depends_on_whether_it_may_have_been_mended(number: int, before: str, later: str) -> None:
    assert judge_xids([log(number)])[0].state == before
    assert judge_xids([log(number)], new_since_s=100.0)[0].state == before
    [found] = judge_xids([log(number, 10.0), log(number, 150.0)], new_since_s=100.0)
    assert (found.state, found.numbers["times"]) == (later, 2)
    assert found.check == f"GPU at 0000:3b:00: Xid {number}"
    assert (XIDS[number].meaning if number in XIDS else "not known here") in found.reason
