"""Shared memory that is allocated before it is written to, so that no write can raise SIGBUS.

Needs nothing but the standard library.
"""

import errno
import os
from pathlib import Path

FOLDER = Path("/dev/shm")
_ALLOCATE_BYTES = 256 << 20
"""Allocated at once; in between, ranks that allocate at the same time see each other's share."""
_RESERVED = 1 / 16
"""Of the memory: what stays free."""
_CGROUP = Path("/sys/fs/cgroup")


class RoomMissing(OSError):
    """The file system or the machine has not enough left."""

    def __init__(self, bytes_needed: int, bytes_free: int, fact: str) -> None:
        super().__init__(f"{bytes_needed:,} bytes of shared memory are needed, {bytes_free:,} are free: {fact}")
        self.bytes_needed, self.bytes_free, self.fact = bytes_needed, bytes_free, fact


def allocate(descriptor: int, num_bytes: int) -> None:
    """Give a file of shared memory all its pages.

    Raises:
        RoomMissing: there is no room. What was allocated is given back with the file.
    """
    status = os.fstatvfs(descriptor)
    if num_bytes > status.f_bavail * status.f_frsize:  # known before others are pushed aside
        raise RoomMissing(num_bytes, status.f_bavail * status.f_frsize, f"{FOLDER}: {os.strerror(errno.ENOSPC)}")
    _refuse_shortage(num_bytes, 0, num_bytes)
    for begin in range(0, num_bytes, _ALLOCATE_BYTES):
        step = min(_ALLOCATE_BYTES, num_bytes - begin)
        _refuse_shortage(num_bytes, begin, step)
        try:
            os.posix_fallocate(descriptor, begin, step)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise
            status = os.fstatvfs(descriptor)
            free = begin + status.f_bavail * status.f_frsize
            raise RoomMissing(num_bytes, free, f"{FOLDER}: {os.strerror(error.errno)}") from error


def _refuse_shortage(num_bytes: int, begin: int, step: int) -> None:
    free, total = available_bytes()
    if free - step < _RESERVED * total:
        raise RoomMissing(num_bytes, begin + free, f"1/{1 / _RESERVED:.0f} of memory must stay free")


def available_bytes() -> tuple[int, int]:
    """Memory that can be allocated without swapping, and all of it: of the machine, or of this control group if less."""
    fields = {line.split(":")[0]: line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines()}
    available, total = int(fields["MemAvailable"]) * 1024, int(fields["MemTotal"]) * 1024
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError, StopIteration):  # no such group, or one without a limit
        return available, total
    return min(available, limit - used + cached), min(total, limit)
