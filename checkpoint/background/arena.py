"""Host memory that a trainer shares with its writer.

An unnamed file of the shared memory file system: nothing is left behind when both processes are killed. All its pages are
allocated and mapped before the first save, so that the first copy is as quick as the others and no write can raise SIGBUS.
"""

import mmap
import os

from evermesh.checkpoint.background.memory import FOLDER, RoomMissing, allocate
from evermesh.checkpoint.errors import HostMemoryShort


class Arena:
    """Memory of ``num_bytes``, all of it allocated.

    Raises:
        HostMemoryShort: the file system or the machine has not enough left. Nothing stays allocated.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        size = max(num_bytes, mmap.PAGESIZE)
        try:
            self.descriptor = os.open(FOLDER, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostMemoryShort(num_bytes, 0, f"{FOLDER} cannot be used: {error.strerror}") from error
        try:
            allocate(self.descriptor, size)
        except BaseException as error:
            os.close(self.descriptor)
            if isinstance(error, RoomMissing):
                raise HostMemoryShort(num_bytes, error.bytes_free, error.fact) from error
            raise
        self.memory = mmap.mmap(self.descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)

    def close(self) -> None:
        """Give the memory back once nothing refers to it and the writer has ended."""
        os.close(self.descriptor)
