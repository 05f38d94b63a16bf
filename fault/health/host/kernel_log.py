"""The kernel log: what drivers said about GPUs, memory and disks. Needs a readable /dev/kmsg (root, often)."""

import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from evermesh.fault.health.verdicts import Verdict, unreadable

_MOST_BYTES = 8192
"""Of one record: the kernel cuts longer ones."""
_MOST_S = 1.0
_FAULTS = {
    "hardware error": re.compile(r"\[Hardware Error\]|Machine check events logged|mce: .*Uncorrected", re.I),
    "disk": re.compile(r"\bI/O error, dev|critical medium error|nvme\d+: .*(?:timeout|controller is down)", re.I),
    "file system": re.compile(r"EXT4-fs error|XFS .*(?:corruption|shutdown)|Remounting filesystem read-only", re.I),
    "PCIe": re.compile(r"AER: .*(?:Uncorrected|Fatal) error|PCIe Bus Error: severity=Uncorrected", re.I),
}
_KILLED = re.compile(r"(?:Out of memory|Memory cgroup out of memory): Killed process (\d+) \(([^)]*)\)")


class LogLine(NamedTuple):
    """One record."""

    since_boot_s: float
    text: str


class KernelLog:
    """Reads /dev/kmsg from its oldest record on, and later what is new. ``why_not`` tells why there is none."""

    def __init__(self, path: str = "/dev/kmsg") -> None:
        self._descriptor: int | None = None
        self.why_not = ""
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self.why_not = f"{path}: {error.strerror}"

    def read(self) -> list[LogLine]:
        """What has come since the last call; takes a second at most."""
        return list(self._read()) if self._descriptor is not None else []

    def _read(self) -> Iterator[LogLine]:
        assert self._descriptor is not None
        until = time.monotonic() + _MOST_S
        while time.monotonic() < until:
            try:
                record = os.read(self._descriptor, _MOST_BYTES)
            except BlockingIOError:
                return
            except BrokenPipeError:  # overwritten before it was read: goes on with the oldest that is left
                continue
            except OSError as error:
                self.why_not = f"{error.strerror}"
                return
            if not record:
                return
            line = parse(record.decode(errors="replace"))
            if line is not None:
                yield line


def parse(record: str) -> LogLine | None:
    """``6,1234,5678901,-;text``: priority, number, microseconds since boot, flags; None for lines of another form."""
    head, separator, text = record.partition(";")
    fields = head.split(",")
    if not separator or len(fields) < 3 or not fields[2].isdigit():
        return None
    return LogLine(int(fields[2]) / 1e6, text.splitlines()[0] if text else "")


def is_of_interest(line: LogLine) -> bool:
    """Whether any check goes by it; the others need not be kept."""
    return "NVRM: Xid" in line.text or any(pattern.search(line.text) for pattern in (*_FAULTS.values(), _KILLED))


def judge_log(lines: Sequence[LogLine], why_not: str = "") -> list[Verdict]:
    """Faults that the kernel has reported, by kind; and whom it killed for want of memory.

    Args:
        lines: all that are of interest, since boot as far as the kernel keeps them.
        why_not: why there are none.
    """
    if why_not and not lines:
        return [unreadable("kernel log", why_not)]
    found = [verdict for kind, pattern in _FAULTS.items() if (verdict := _fault(kind, pattern, lines))]
    killed = [match for line in lines if (match := _KILLED.search(line.text))]
    told = f"; {len(killed)} processes were killed for want of memory, the last {killed[-1][2]}" if killed else ""
    told = f"{len(found)} kinds of faults since boot{told}" if found else f"no faults since boot{told}"
    return [*found, Verdict("kernel log", "ok", told, {"killed": float(len(killed))})]


def _fault(kind: str, pattern: re.Pattern[str], lines: Sequence[LogLine]) -> Verdict | None:
    matching = [line for line in lines if pattern.search(line.text)]
    if not matching:
        return None
    last = matching[-1]
    reason = f"{len(matching)} lines since boot; the last one {last.since_boot_s:.0f} s after it: {last.text[:120]!r}"
    return Verdict(f"kernel log: {kind}", "warn", reason, {"lines": float(len(matching))}, "dmesg -T tells all of them")
