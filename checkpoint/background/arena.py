"""Host memory that a trainer shares with its writer.

An unnamed file of the shared memory file system: nothing is left behind when both processes are killed. All its pages are
allocated and mapped before the first save, so that the first copy is as quick as the others and no write can raise SIGBUS.
"""

import errno
import mmap
import os
from pathlib import Path

from evermesh.checkpoint.errors import HostMemoryShort

_FOLDER = Path("/dev/shm")
_ALLOCATE_BYTES = 256 << 20
"""Allocated at once; in between, ranks that allocate at the same time see each other's share."""
_RESERVED = 1 / 16
"""Of the memory: what an arena leaves free."""
_CGROUP = Path("/sys/fs/cgroup")


class Arena:
    """Memory of ``num_bytes``, all of it allocated.

    Raises:
        HostMemoryShort: the file system or the machine has not enough left. Nothing stays allocated.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        size = max(num_bytes, mmap.PAGESIZE)
        try:
            self.descriptor = os.open(_FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostMemoryShort(num_bytes, 0, f"{_FOLDER} cannot be used: {error.strerror}") from error
        try:
            _allocate(self.descriptor, size)
        except BaseException:
            os.close(self.descriptor)
            raise
        self.memory = mmap.mmap(self.descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)

    def close(self) -> None:
        """Give the memory back once nothing refers to it and the writer has ended."""
        os.close(self.descriptor)


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


def _allocate(descriptor: int, num_bytes: int) -> None:
    for begin in range(0, num_bytes, _ALLOCATE_BYTES):
        step = min(_ALLOCATE_BYTES, num_bytes - begin)
        available, total = available_bytes()
        if available - step < _RESERVED * total:
            raise HostMemoryShort(num_bytes, begin + available, f"1/{1 / _RESERVED:.0f} of memory must stay free")
        try:
            os.posix_fallocate(descriptor, begin, step)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
                raise
            status = os.fstatvfs(descriptor)
            free = begin + status.f_bavail * status.f_frsize
            raise HostMemoryShort(num_bytes, free, f"{_FOLDER}: {error.strerror}") from error
