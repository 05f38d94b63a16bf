"""Memory: what is available, errors that its controller counts, swap, and processes that were killed for want of it."""

from collections.abc import Iterator

from evermesh.fault.health.host.files import FileCheck, Files, Look, names, number, table
from evermesh.fault.health.verdicts import State, Verdict, unreadable

_GIB = 1 << 30
_LITTLE, _TOO_LITTLE = 0.05, 0.01
"""Shares of memory: with less available a rank is killed soon; ranks cannot be started."""
_BUSY_SWAP_PAGES = 25_600
"""Written out since the last look: 100 MiB of 4 KiB pages."""
_MANY_CORRECTED = 1000
_EDAC = "sys/devices/system/edac/mc"


def judge_available(look: Look) -> list[Verdict]:
    """Memory that processes here can still get: of the machine, and of the control group."""
    if "proc/meminfo" not in look.now:
        return [unreadable("memory", "/proc/meminfo")]
    told = table(look.now["proc/meminfo"])
    total, available = told["MemTotal"] << 10, told.get("MemAvailable", told.get("MemFree", 0)) << 10
    where = "of the machine"
    limit, used = _group_limit(look.now)
    if limit is not None and limit < total and limit - used < available:
        total, available, where = limit, max(0, limit - used), "of the control group"
    share = available / total
    state: State = "bad" if share < _TOO_LITTLE else "warn" if share < _LITTLE else "ok"
    reason = f"{available / _GIB:.1f} of {total / _GIB:.1f} GiB {where} are available"
    way_out = "" if state == "ok" else "end what uses it (ps aux --sort -rss), or give the container more"
    numbers = {"available_bytes": float(available), "total_bytes": float(total)}
    return [Verdict("memory", state, reason, numbers, way_out)]


def _group_limit(files: Files) -> tuple[int | None, int]:
    """Of the control group that is mounted as the root of this container: limit and use without caches, bytes."""
    limit = number(files, "sys/fs/cgroup/memory.max")
    used = number(files, "sys/fs/cgroup/memory.current") or 0
    caches = table(files.get("sys/fs/cgroup/memory.stat", "")).get("inactive_file", 0)
    if limit is None:
        limit = number(files, "sys/fs/cgroup/memory/memory.limit_in_bytes")
        used = number(files, "sys/fs/cgroup/memory/memory.usage_in_bytes") or 0
        caches = table(files.get("sys/fs/cgroup/memory/memory.stat", "")).get("total_inactive_file", 0)
    return limit, max(0, used - caches)


def judge_swap(look: Look) -> list[Verdict]:
    """Whether memory goes to disk: ranks that wait for pages look like slow ones."""
    told, counted = table(look.now.get("proc/meminfo", "")), table(look.now.get("proc/vmstat", ""))
    used = (told.get("SwapTotal", 0) - told.get("SwapFree", 0)) << 10
    written = counted.get("pswpout", 0)
    before = table(look.last.get("proc/vmstat", "")).get("pswpout", written) if look.last else written
    numbers = {"used_bytes": float(used), "pages_out": float(written - before)}
    if written - before > _BUSY_SWAP_PAGES:
        reason = f"{written - before:,} pages were written to swap since the last look; {used / _GIB:.1f} GiB are there"
        return [Verdict("swap", "warn", reason, numbers, "end what uses the memory, or swapoff -a")]
    return [Verdict("swap", "ok", f"{used / _GIB:.1f} GiB are swapped out", numbers)]


def judge_killed(look: Look) -> list[Verdict]:
    """Processes that the kernel killed for want of memory, since the first look."""
    killed = _killed(look.now)
    if killed is None:
        return [unreadable("OOM kills", "neither /proc/vmstat nor the control group counts them")]
    before = killed if look.first is None else _killed(look.first) or 0
    numbers = {"kills": float(killed - before), "kills_since_boot": float(killed)}
    if killed > before:
        reason = f"the kernel has killed {killed - before} processes for want of memory since this job came here"
        way_out = "lower train.layout.capacity or the workers of this node; dmesg tells which processes"
        return [Verdict("OOM kills", "warn", reason, numbers, way_out)]
    return [Verdict("OOM kills", "ok", f"none since the first look, {killed} since boot", numbers)]


def _killed(files: Files) -> int | None:
    machine = table(files.get("proc/vmstat", "")).get("oom_kill")
    group = table(files.get("sys/fs/cgroup/memory.events", "")).get("oom_kill")
    known = [count for count in (machine, group) if count is not None]
    return max(known) if known else None  # the machine's count holds the group's


def judge_errors(look: Look) -> list[Verdict]:
    """Errors of memory modules (EDAC): corrected ones, and those that were not."""
    controllers = [name for name in names(look.now, _EDAC) if name.startswith("mc")]
    if not controllers:
        return [unreadable("memory errors", "no memory controller reports to EDAC")]
    return list(_controllers(look, controllers))


def _controllers(look: Look, controllers: list[str]) -> Iterator[Verdict]:
    for name in controllers:
        check = f"memory errors of {name}"
        corrected = number(look.now, f"{_EDAC}/{name}/ce_count") or 0
        uncorrected = number(look.now, f"{_EDAC}/{name}/ue_count") or 0
        before = 0 if look.first is None else number(look.first, f"{_EDAC}/{name}/ce_count") or 0
        numbers = {"corrected": float(corrected), "uncorrected": float(uncorrected)}
        if uncorrected:
            reason = f"{uncorrected} errors could not be corrected since boot: what was computed here may be wrong"
            yield Verdict(check, "bad", reason, numbers, "take the node out and have the module changed (edac-util -v)")
        elif corrected - before >= _MANY_CORRECTED:
            reason = f"{corrected - before:,} errors were corrected, which is slow, and often comes before worse"
            yield Verdict(check, "warn", reason, numbers, "have the module changed (edac-util -v)")
        else:
            yield Verdict(check, "ok", f"{corrected} were corrected since boot, none was left", numbers)


_GROUP = [
    f"sys/fs/cgroup/{name}"
    for name in (
        "memory.max",
        "memory.current",
        "memory.stat",
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
    )
]
AVAILABLE = FileCheck(("proc/meminfo", *_GROUP), judge_available)
SWAP = FileCheck(("proc/meminfo", "proc/vmstat"), judge_swap)
KILLED = FileCheck(("proc/vmstat", "sys/fs/cgroup/memory.events"), judge_killed)
ERRORS = FileCheck((f"{_EDAC}/mc*/ce_count", f"{_EDAC}/mc*/ue_count"), judge_errors)
