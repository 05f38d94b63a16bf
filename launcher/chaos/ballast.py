"""A file that takes the room of a file system, for a while."""

import os
from contextlib import suppress
from pathlib import Path

from evermesh.fault.injection import Fill

_SHARED_MEMORY = Path("/dev/shm")


class Ballast:
    """All but ``fault.free_bytes`` of what is free below ``directory``, or in shared memory; at most ``most_bytes``.

    The file has no name: the kernel gives the room back however this process ends.
    """

    def __init__(self, fault: Fill, directory: Path) -> None:
        folder = directory if fault.place == "disk" else _SHARED_MEMORY
        path = folder / f"evermesh-ballast-{os.getpid()}"
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        path.unlink()
        status = os.statvfs(folder)
        self.num_bytes = max(0, min(status.f_bavail * status.f_frsize - fault.free_bytes, fault.most_bytes))
        if self.num_bytes:
            with suppress(OSError):  # somebody was quicker: it is full
                os.posix_fallocate(self._descriptor, 0, self.num_bytes)

    def remove(self) -> None:
        """Give the room back."""
        os.close(self._descriptor)
