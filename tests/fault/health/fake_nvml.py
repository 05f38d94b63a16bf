"""Stands for the library of NVIDIA's driver where there is no GPU: the functions in use, with values as tests set them.

It is a substitute for hardware, not for the library: that it is absent here is tested with the real one.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """As in pynvml; functions that a GPU does not support raise it."""


class FakeNvml:
    """GPUs by index, each with what its functions answer; a function that is missing there is not supported."""

    NVMLError = NVMLError

    def __init__(self, *gpus: dict[str, Any], starts: bool = True) -> None:
        self.gpus, self.starts, self.is_open = gpus, starts, 0

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.starts:
            raise NVMLError("Driver Not Loaded")
        self.is_open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.is_open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gpus)

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802
        return b"580.65"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:  # noqa: N802
        assert self.is_open
        return self.gpus[index]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)

        def ask(handle: dict[str, Any], *arguments: Any) -> Any:
            answer = handle.get(name.removeprefix("nvmlDeviceGet"), NVMLError("Not Supported"))
            answer = answer(*arguments) if callable(answer) else answer
            if isinstance(answer, NVMLError):
                raise answer
            return answer

        return ask


def healthy(**changed: Any) -> dict[str, Any]:
    """An accelerator at work, 18 NVLink connections, nothing wrong."""
    return {
        "UUID": "GPU-0",
        "Name": b"NVIDIA H100 80GB HBM3",
        "PciInfo": SimpleNamespace(busId=b"00000000:3B:00.0"),
        "TotalEccErrors": lambda kind, counter: 0,
        "RemappedRows": (0, 0, 0, 0),
        "CurrentClocksEventReasons": 0x4,
        "NvLinkState": lambda link: 1 if link < 18 else NVMLError("Invalid Argument"),
        "NvLinkErrorCounter": lambda link, counter: 0,
        "CurrPcieLinkGeneration": 5,
        "MaxPcieLinkGeneration": 5,
        "CurrPcieLinkWidth": 16,
        "MaxPcieLinkWidth": 16,
        "PerformanceState": 0,
        "ClockInfo": lambda clock: 1755,
        "MaxClockInfo": lambda clock: 1980,
        "Temperature": lambda sensor: 54,
        "TemperatureThreshold": lambda threshold: 87,
        "PowerUsage": 612_000,
        "EnforcedPowerLimit": 700_000,
        "PowerManagementDefaultLimit": 700_000,
        **changed,
    }
