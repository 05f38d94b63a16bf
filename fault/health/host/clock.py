"""Whether the clock of this machine is kept right, as the kernel tells it (adjtimex), and who keeps it."""

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from evermesh.fault.health.verdicts import Verdict, unreadable

_STA_UNSYNC, _STA_NANO, _TIME_ERROR = 0x40, 0x2000, 5
_FAR_S = 0.1
"""Events of nodes whose clocks are further apart are hard to put in order."""
_KEEPERS = {
    "chrony": "run/chrony",
    "systemd-timesyncd": "run/systemd/timesync/synchronized",
    "ntpd": "run/ntpd.pid",
    "ptp4l": "run/ptp4l",
}
_PTP = "sys/class/ptp"


class _Timex(ctypes.Structure):
    """``struct timex`` up to what is read here; the kernel writes 208 bytes."""

    _fields_ = [
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    ]


class ClockState(NamedTuple):
    """What the kernel knows of its own clock."""

    is_synchronised: bool
    offset_s: float
    """Still to be corrected."""
    max_error_s: float


def read_clock() -> ClockState | None:
    """Ask the kernel; changes nothing. None where it does not answer."""
    timex = _Timex()
    try:
        answer = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex))
    except (OSError, AttributeError):
        return None
    if answer < 0:
        return None
    unit_s = 1e-9 if timex.status & _STA_NANO else 1e-6
    is_synchronised = answer != _TIME_ERROR and not timex.status & _STA_UNSYNC
    return ClockState(is_synchronised, timex.offset * unit_s, timex.maxerror * 1e-6)


def read_keepers(root: Path = Path("/")) -> list[str]:
    """Which programs keep the time here, as far as they leave traces."""
    found = [name for name, path in _KEEPERS.items() if os.path.lexists(root / path)]
    return found + (["a hardware clock (PTP)"] if (root / _PTP).is_dir() and any((root / _PTP).iterdir()) else [])


def judge_clock(state: ClockState | None, keepers: list[str]) -> Verdict:
    """Whether times of this machine can be compared with those of others."""
    if state is None:
        return unreadable("clock", "the kernel does not tell (adjtimex)")
    by = f" ({', '.join(keepers)})" if keepers else ""
    numbers: Mapping[str, float] = {"offset_s": state.offset_s, "max_error_s": state.max_error_s}
    way_out = "start chrony or systemd-timesyncd on the machine, not in the container"
    if not state.is_synchronised:
        reason = f"nobody keeps it right{by}: times of nodes cannot be compared"
        return Verdict("clock", "warn", reason, numbers, way_out)
    if abs(state.offset_s) > _FAR_S:
        return Verdict("clock", "warn", f"is {abs(state.offset_s):.3f} s off{by}", numbers, way_out)
    return Verdict("clock", "ok", f"is kept right{by}, {1e3 * abs(state.offset_s):.3f} ms off", numbers)
