"""The shared-memory area of a node: what its agent can read of its workers from outside, wedged or stopped ones too.

AREA/board    one slot of 64 bytes per local rank, written by the worker, read by the agent

The space is reserved when the file is made: writing into a full file system would end a worker with SIGBUS later.
"""

import mmap
import os
import shutil
import struct
import tempfile
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from evermesh.launcher.errors import SharedMemoryMissing

_SLOT_BYTES = 64
_SLOT = struct.Struct("<QQQQddQ")
"""Sequence number, generation, pid, step, step_s, compute_s, sequence number: a torn read shows two different ones."""
_TRIES = 5


class Slot(NamedTuple):
    """What one worker last wrote down."""

    generation: int
    pid: int
    step: int
    step_s: float
    compute_s: float


class SharedArea:
    """A folder in shared memory that belongs to one agent, and goes with it. A context manager.

    Raises:
        SharedMemoryMissing: there is no room for it; nothing is left.
    """

    def __init__(self, name: str, slots: int) -> None:
        root = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
        self.directory = root / f"evermesh-{os.getuid()}-{name}"
        shutil.rmtree(self.directory, ignore_errors=True)  # of an agent that was killed
        self.num_bytes = max(slots, 1) * _SLOT_BYTES
        try:
            self.directory.mkdir(mode=0o700)
            _reserve(self.board, self.num_bytes)
        except OSError as error:
            self.close()
            raise SharedMemoryMissing(
                f"{self.num_bytes} bytes of shared memory cannot be had in {root} "
                f"({shutil.disk_usage(root).free:,} free): {error.strerror}. Make it larger (docker: --shm-size)."
            ) from error

    @property
    def board(self) -> Path:
        """The file with the slots."""
        return self.directory / "board"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.directory, ignore_errors=True)


class Board:
    """The slots of ``path``: a worker writes its own, the agent reads all."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 0)

    def write(self, place: int, slot: Slot) -> None:
        """Replace the slot of local rank ``place``."""
        offset = place * _SLOT_BYTES
        sequence = int.from_bytes(self._memory[offset : offset + 8], "little") + 1
        packed = _SLOT.pack(sequence, *slot, sequence)
        self._memory[offset : offset + 8] = packed[:8]
        self._memory[offset + 8 : offset + len(packed)] = packed[8:]

    def read(self, place: int) -> Slot | None:
        """The slot of local rank ``place``; None when it is being written all the time."""
        for _ in range(_TRIES):
            first, *values, last = _SLOT.unpack_from(self._memory, place * _SLOT_BYTES)
            if first == last:
                return Slot(*values)
        return None

    def close(self) -> None:
        """Unmap the file."""
        self._memory.close()


def _reserve(path: Path, num_bytes: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    finally:
        os.close(descriptor)
