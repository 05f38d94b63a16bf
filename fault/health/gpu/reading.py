"""What NVML tells of every GPU at one moment. Whatever a GPU, or its driver, does not support is None."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_MOST_LINKS = 36
"""NVLink connections that a GPU may have at most."""
_LINK_ERRORS = {"replay": 0, "recovery": 1, "flit CRC": 2, "data CRC": 3}
"""``nvmlNvLinkErrorCounter_t``."""
_CORRECTED, _UNCORRECTED = 0, 1
_VOLATILE, _AGGREGATE = 0, 1
_SLOWDOWN_THRESHOLD, _CORE_SENSOR, _SM_CLOCK = 1, 0, 1
_CAUSES = (0, 1)
"""Of retired pages: several single-bit errors, one double-bit error."""
_THROTTLES = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Reasons for low clocks that tell of trouble; idling, a power cap and clocks that somebody set do not."""


@dataclass(frozen=True, slots=True)
class Link:
    """One NVLink connection."""

    is_up: bool
    errors: dict[str, int]
    """By kind, since the driver was loaded."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Errors of memory are since the driver was loaded, unless said otherwise."""

    index: int
    name: str = ""
    bus: str = ""
    lost: str = ""
    """Why nothing else is known of it: it does not answer."""
    corrected: int | None = None
    uncorrected: int | None = None
    uncorrected_ever: int | None = None
    rows_replaced: int | None = None
    row_pending: bool | None = None
    """A row will be replaced at the next reset."""
    row_failed: bool | None = None
    """A row could not be replaced."""
    pages_retired: int | None = None
    throttles: tuple[str, ...] | None = None
    links: tuple[Link, ...] = ()
    pcie_generation: int | None = None
    pcie_most_generation: int | None = None
    pcie_width: int | None = None
    pcie_most_width: int | None = None
    performance_state: int | None = None
    """0 is the fastest; idle GPUs are in 8 and higher, where PCIe may run slower."""
    clock_mhz: int | None = None
    most_clock_mhz: int | None = None
    temperature_c: int | None = None
    slowdown_c: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None


@dataclass(frozen=True, slots=True)
class GpusReading:
    """All GPUs of the machine; ``why_none`` tells why nothing can be known of any."""

    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    why_none: str = ""


def read_gpus(nvml: Any = None) -> GpusReading:
    """Ask the driver. ``nvml`` has the functions of the module ``pynvml``; None: that module."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return GpusReading(why_none="nvidia-ml-py is not installed")
    try:
        with session(nvml):
            gpus = tuple(_Reader(nvml, index).read() for index in range(nvml.nvmlDeviceGetCount()))
            return GpusReading(gpus, text(nvml.nvmlSystemGetDriverVersion()))
    except nvml.NVMLError as error:
        return GpusReading(why_none=f"no driver answers ({error})")


@contextmanager
def session(nvml: Any) -> Iterator[None]:
    nvml.nvmlInit()
    try:
        yield
    finally:
        nvml.nvmlShutdown()


class _Reader:
    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml, self._index = nvml, index

    def read(self) -> Gpu:
        """All that is known of the GPU; one that does not answer is told as lost."""
        try:
            self._handle = self._nvml.nvmlDeviceGetHandleByIndex(self._index)
            self._nvml.nvmlDeviceGetUUID(self._handle)
        except self._nvml.NVMLError as error:
            return Gpu(self._index, lost=str(error))
        ask = self._ask
        rows = ask("nvmlDeviceGetRemappedRows") or (None, None, None, None)
        replaced = None if rows[0] is None else rows[0] + rows[1]
        pci = ask("nvmlDeviceGetPciInfo")
        return Gpu(
            index=self._index,
            name=text(ask("nvmlDeviceGetName") or ""),
            bus=text(pci.busId).lower() if pci else "",
            corrected=ask("nvmlDeviceGetTotalEccErrors", _CORRECTED, _VOLATILE),
            uncorrected=ask("nvmlDeviceGetTotalEccErrors", _UNCORRECTED, _VOLATILE),
            uncorrected_ever=ask("nvmlDeviceGetTotalEccErrors", _UNCORRECTED, _AGGREGATE),
            rows_replaced=replaced,
            row_pending=None if rows[2] is None else bool(rows[2]),
            row_failed=None if rows[3] is None else bool(rows[3]),
            pages_retired=self._pages_retired(),
            throttles=self._throttles(),
            links=tuple(self._links()),
            pcie_generation=ask("nvmlDeviceGetCurrPcieLinkGeneration"),
            pcie_most_generation=ask("nvmlDeviceGetMaxPcieLinkGeneration"),
            pcie_width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
            pcie_most_width=ask("nvmlDeviceGetMaxPcieLinkWidth"),
            performance_state=ask("nvmlDeviceGetPerformanceState"),
            clock_mhz=ask("nvmlDeviceGetClockInfo", _SM_CLOCK),
            most_clock_mhz=ask("nvmlDeviceGetMaxClockInfo", _SM_CLOCK),
            temperature_c=ask("nvmlDeviceGetTemperature", _CORE_SENSOR),
            slowdown_c=ask("nvmlDeviceGetTemperatureThreshold", _SLOWDOWN_THRESHOLD),
            power_w=_watts(ask("nvmlDeviceGetPowerUsage")),
            power_limit_w=_watts(ask("nvmlDeviceGetEnforcedPowerLimit")),
            default_power_limit_w=_watts(ask("nvmlDeviceGetPowerManagementDefaultLimit")),
        )

    def _ask(self, function: str, *arguments: Any) -> Any:
        """None where this GPU, this driver or this version of the library does not tell."""
        call: Callable[..., Any] | None = getattr(self._nvml, function, None)
        if call is None:
            return None
        try:
            return call(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None

    def _pages_retired(self) -> int | None:
        found = [self._ask("nvmlDeviceGetRetiredPages", cause) for cause in _CAUSES]
        known = [len(pages) for pages in found if pages is not None]
        return sum(known) if known else None

    def _throttles(self) -> tuple[str, ...] | None:
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") if bits is None else bits
        return None if bits is None else tuple(text for bit, text in _THROTTLES.items() if bits & bit)

    def _links(self) -> Iterator[Link]:
        for link in range(_MOST_LINKS):
            state = self._ask("nvmlDeviceGetNvLinkState", link)
            if state is None:
                return
            errors = {kind: self._ask("nvmlDeviceGetNvLinkErrorCounter", link, no) for kind, no in _LINK_ERRORS.items()}
            yield Link(bool(state), {kind: count for kind, count in errors.items() if count is not None})


def text(told: str | bytes) -> str:
    return told.decode() if isinstance(told, bytes) else told


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000
