"""Load: pressure stalls, processes that wait for a device or for nobody, and how many files may be open."""

from collections.abc import Iterator

from evermesh.fault.health.host.files import FileCheck, Files, Look
from evermesh.fault.health.verdicts import Verdict, unreadable

_STALLED = {"memory": 10.0, "io": 40.0}
"""Percent of the last minute in which all tasks at once stood still for it."""
_LEAST_FILES = 4096
_MANY_ZOMBIES = 100


def judge_pressure(look: Look) -> list[Verdict]:
    """How long everything stood still for want of memory or disks (pressure stall information)."""
    found = [(kind, _full_percent(look.now.get(f"proc/pressure/{kind}", ""))) for kind in _STALLED]
    known = {kind: percent for kind, percent in found if percent is not None}
    if not known:
        return [unreadable("pressure", "this kernel tells none (/proc/pressure)")]
    numbers = {f"{kind}_full_percent": percent for kind, percent in known.items()}
    told = ", ".join(f"{percent:.0f} % for {kind}" for kind, percent in known.items())
    if any(percent > _STALLED[kind] for kind, percent in known.items()):
        reason = f"everything stood still for part of the last minute: {told}"
        return [Verdict("pressure", "warn", reason, numbers, "end what else runs here")]
    return [Verdict("pressure", "ok", f"stood still in the last minute: {told}", numbers)]


def _full_percent(text: str) -> float | None:
    for line in text.splitlines():
        if line.startswith("full "):
            return float(dict(word.split("=") for word in line.split()[1:])["avg60"])
    return None


def judge_load(look: Look) -> list[Verdict]:
    """How many tasks want a processor, per processor of this machine."""
    if "proc/loadavg" not in look.now:
        return [unreadable("load", "/proc/loadavg")]
    one, five, _ = (float(word) for word in look.now["proc/loadavg"].split()[:3])
    processors = _count(look.now.get("sys/devices/system/cpu/online", "0"))
    numbers = {"load_1min": one, "load_5min": five, "processors": float(processors)}
    return [Verdict("load", "ok", f"{one:.1f} tasks want the {processors} processors", numbers)]


def _count(ranges: str) -> int:
    """Of ``0-3,8``: 5."""
    ends = [part.split("-") for part in ranges.strip().split(",")]
    return sum(int(end[-1]) - int(end[0]) + 1 for end in ends)


def judge_processes(look: Look) -> list[Verdict]:
    """Processes in state D at two looks in a row, in the same life: what they wait for does not answer."""
    now = _states(look.now)
    if not now:
        return [unreadable("processes", "/proc shows none")]
    before = _states(look.last) if look.last else {}
    stuck = [name for key, (letter, name) in now.items() if letter == "D" and before.get(key, ("", ""))[0] == "D"]
    zombies = sum(letter == "Z" for letter, _ in now.values())
    numbers = {"processes": float(len(now)), "stuck": float(len(stuck)), "zombies": float(zombies)}
    if stuck:
        reason = (
            f"{len(stuck)} processes wait for a device or a file system that does not answer: {', '.join(stuck[:5])}"
        )
        return [Verdict("processes", "warn", reason, numbers, "dmesg tells which; a mount that is away, or a GPU")]
    if zombies > _MANY_ZOMBIES:
        reason = f"{zombies} processes have ended and nobody asks for them"
        return [
            Verdict("processes", "warn", reason, numbers, "their parents have a bug, or the container no init (--init)")
        ]
    return [Verdict("processes", "ok", f"{len(now)}, none stuck, {zombies} zombies", numbers)]


def _states(files: Files) -> dict[tuple[str, str], tuple[str, str]]:
    """By number and time of start of every process: its state and its name."""
    return dict(_parsed(files))


def _parsed(files: Files) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    for path, text in files.items():
        if path.startswith("proc/") and path.endswith("/stat"):
            head, _, tail = text.rpartition(")")
            fields = tail.split()
            if len(fields) > 19:
                yield (path, fields[19]), (fields[0], head.partition("(")[2])


def judge_file_limit(look: Look) -> list[Verdict]:
    """How many files and connections a process may have open."""
    for line in look.now.get("proc/self/limits", "").splitlines():
        if line.startswith("Max open files"):
            soft = line.split()[3]
            allowed = float("inf") if soft == "unlimited" else float(soft)
            if allowed < _LEAST_FILES:
                reason = f"a process may have {soft} files open; ranks of large jobs need {_LEAST_FILES:,}"
                return [Verdict("open files", "warn", reason, {"limit": allowed}, f"ulimit -n {_LEAST_FILES * 16}")]
            return [Verdict("open files", "ok", f"{soft} per process", {"limit": allowed} if soft.isdigit() else {})]
    return [unreadable("open files", "/proc/self/limits")]


PRESSURE = FileCheck(("proc/pressure/memory", "proc/pressure/io"), judge_pressure)
LOAD = FileCheck(("proc/loadavg", "sys/devices/system/cpu/online"), judge_load)
PROCESSES = FileCheck(("proc/[0-9]*/stat",), judge_processes)
FILE_LIMIT = FileCheck(("proc/self/limits",), judge_file_limit)
