"""File systems that a job writes to: room, whether they can be written at all, and how long it takes until it is on disk."""

import errno
import os
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from evermesh.fault.health.verdicts import State, Verdict

_GIB = 1 << 30
_LITTLE_SHARE, _LITTLE_BYTES = 0.02, 2 * _GIB
"""With less room than both the next checkpoint may not fit."""
_SLOW_S = 1.0
_BROKEN = (errno.EIO, errno.EROFS, errno.ENODEV, errno.ESTALE, errno.EUCLEAN)
"""The device or the mount is at fault, not the space or the permission."""


class DiskReading(NamedTuple):
    """One file system, and what came of writing 4 KiB to it."""

    free_bytes: int
    total_bytes: int
    is_read_only: bool
    write_s: float | None = None
    """Until it was on disk; None: nothing was written."""
    error: OSError | None = None


def read_disk(folder: Path, *, writes: bool = True) -> DiskReading:
    """Look at the file system of ``folder``; nothing is left there."""
    try:
        told = os.statvfs(folder)
    except OSError as error:
        return DiskReading(0, 0, False, error=error)
    size = told.f_frsize
    found = DiskReading(told.f_bavail * size, told.f_blocks * size, bool(told.f_flag & os.ST_RDONLY))
    if not writes or found.is_read_only:
        return found
    began_s = time.monotonic()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return found._replace(error=error)
    return found._replace(write_s=time.monotonic() - began_s)


def judge_disk(what: str, folder: Path, found: DiskReading) -> Verdict:
    """A full file system is no fault of the node and ends no run; one that breaks or turned read-only is."""
    check = f"disk of {what}"
    numbers = {"free_bytes": float(found.free_bytes), "total_bytes": float(found.total_bytes)}
    numbers |= {} if found.write_s is None else {"write_s": found.write_s}
    room = f"{found.free_bytes / _GIB:.1f} of {found.total_bytes / _GIB:.1f} GiB are free in {folder}"
    if found.is_read_only:
        return Verdict(
            check, "bad", f"{folder} is mounted read-only", numbers, "dmesg tells why; check the disk, remount it"
        )
    if found.error is not None:
        state: State = "bad" if found.error.errno in _BROKEN else "warn"
        reason = f"writing to {folder} failed: {found.error.strerror or found.error}"
        way_out = (
            "make room" if found.error.errno in (errno.ENOSPC, errno.EDQUOT) else "look at the mount and its rights"
        )
        return Verdict(check, state, reason, numbers, way_out)
    if found.free_bytes < min(_LITTLE_BYTES, _LITTLE_SHARE * found.total_bytes):
        return Verdict(check, "warn", room, numbers, "make room, or choose another place")
    if found.write_s is not None and found.write_s > _SLOW_S:
        reason = f"4 KiB took {found.write_s:.1f} s until they were on disk; {room}"
        return Verdict(check, "warn", reason, numbers, "see what else writes there (iostat, iotop)")
    return Verdict(check, "ok", room, numbers)


def judge_shared_memory(found: DiskReading, folder: Path = Path("/dev/shm")) -> Verdict:
    """Where rings and snapshots are kept: a container often has only 64 MiB of it."""
    numbers = {"free_bytes": float(found.free_bytes), "total_bytes": float(found.total_bytes)}
    if found.error is not None:
        return Verdict(
            "shared memory", "warn", f"{folder}: {found.error.strerror}", numbers, f"mount a tmpfs at {folder}"
        )
    reason = f"{found.free_bytes / _GIB:.2f} of {found.total_bytes / _GIB:.2f} GiB are free in {folder}"
    if found.free_bytes < 256 << 20:
        way_out = "docker run --shm-size, or in Kubernetes a volume of medium Memory on /dev/shm"
        return Verdict("shared memory", "warn", f"{reason}: no room for snapshots", numbers, way_out)
    return Verdict("shared memory", "ok", reason, numbers)
