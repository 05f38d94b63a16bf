"""Xid errors: what the NVIDIA driver reports in the kernel log, what it means and what to do.

After NVIDIA's "XID Errors" (docs.nvidia.com/deploy/xid-errors), in our own words. What is not listed is told as it is.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from evermesh.fault.health.host.kernel_log import LogLine
from evermesh.fault.health.verdicts import State, Verdict

Action = Literal["program", "watch", "reset", "reboot", "hardware"]
_WAYS_OUT: Mapping[Action, str] = {
    "program": "look at the program that ran there; the GPU need not be at fault",
    "watch": "nothing yet; reset the GPU when no job runs (nvidia-smi -r)",
    "reset": "end what runs there and reset the GPU (nvidia-smi -r); if it comes back, have the hardware looked at",
    "reboot": "take the node out and reboot it; if it comes back, have the hardware looked at",
    "hardware": "take the node out and have GPU, slot and power looked at",
}


class Xid(NamedTuple):
    """One kind of error."""

    meaning: str
    action: Action


XIDS: Mapping[int, Xid] = {
    13: Xid("an exception in the graphics engine, mostly an access out of bounds by a kernel", "program"),
    31: Xid("a page fault in GPU memory, mostly an invalid address of a program", "program"),
    32: Xid("a corrupted stream of commands, by a program, the driver, or PCIe", "program"),
    43: Xid("the GPU stopped working for one program, which is ended", "program"),
    45: Xid("the work of a program was cleaned up after an earlier error, or because it was ended", "program"),
    48: Xid("two bits of memory were wrong at once, which ECC cannot correct", "reset"),
    61: Xid("an internal micro-controller warned", "reset"),
    62: Xid("an internal micro-controller halted", "reset"),
    63: Xid("a memory page was retired, or a row is to be replaced at the next reset", "watch"),
    64: Xid("a memory page could not be retired, or a row not be replaced", "reset"),
    69: Xid("an exception in a class of the graphics engine", "program"),
    74: Xid("an NVLink connection has failed", "reset"),
    79: Xid("the GPU has fallen off the PCIe bus", "reboot"),
    92: Xid("ECC corrects errors at a high rate", "watch"),
    94: Xid("an uncorrectable memory error was contained: it ended only the program that met it", "watch"),
    95: Xid("an uncorrectable memory error was not contained: every program on the GPU may be wrong", "reset"),
    109: Xid("a switch between contexts took too long", "program"),
    119: Xid("the GPU's system processor (GSP) does not answer the driver", "reset"),
    120: Xid("the GPU's system processor (GSP) has failed", "reset"),
    140: Xid("ECC met an error that it could not recover from", "reset"),
    143: Xid("the GPU could not be initialised", "hardware"),
}
_LINE = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)(?:,\s*(.*))?")


class XidEvent(NamedTuple):
    """One line of the driver."""

    bus: str
    """Where on PCIe, as the driver writes it: ``0000:3b:00``."""
    number: int
    text: str
    since_boot_s: float


def xid_events(lines: Iterable[LogLine]) -> list[XidEvent]:
    """What the driver has reported, oldest first."""
    found = ((line, _LINE.search(line.text)) for line in lines)
    return [
        XidEvent(match[1].lower(), int(match[2]), match[3] or "", line.since_boot_s) for line, match in found if match
    ]


def judge_xids(lines: Iterable[LogLine], new_since_s: float | None = None) -> list[Verdict]:
    """One verdict for each kind of error on each GPU.

    Args:
        new_since_s: seconds after boot at which this watch began. What came before, and a reset mends, may have been
            mended: it is a warning. What only a reboot mends has not: the log would be gone. None: all came before.
    """
    by_kind: dict[tuple[str, int], list[XidEvent]] = {}
    for event in xid_events(lines):
        by_kind.setdefault((event.bus, event.number), []).append(event)
    return [_judge(bus, number, events, new_since_s) for (bus, number), events in by_kind.items()]


def _judge(bus: str, number: int, events: list[XidEvent], new_since_s: float | None) -> Verdict:
    known, last = XIDS.get(number), events[-1]
    is_new = new_since_s is not None and last.since_boot_s >= new_since_s
    action: Action = known.action if known else "watch"
    is_bad = action in ("reboot", "hardware") or (action == "reset" and is_new)
    state: State = "bad" if is_bad else "warn" if is_new or action != "program" else "ok"
    meaning = known.meaning if known else f"an error that is not known here: {last.text[:100]}"
    reason = f"{meaning}; {len(events)} times since boot, the last {last.since_boot_s:.0f} s after it"
    numbers = {"xid": float(number), "times": float(len(events)), "last_since_boot_s": last.since_boot_s}
    way_out = _WAYS_OUT[action] if known else "look it up in NVIDIA's list of Xid errors"
    return Verdict(f"GPU at {bus}: Xid {number}", state, reason, numbers, way_out)
