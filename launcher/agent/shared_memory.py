"""The shared-memory area of a node: what its agent can read of its workers from outside, wedged or stopped ones too.

AREA/board    one slot of 128 bytes per local rank, written by the worker, read by the agent

The space is reserved when the file is made: writing into a full file system would end a worker with SIGBUS later.
"""

import fcntl
import mmap
import os
import shutil
import struct
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, get_args

from evermesh.launcher.errors import SharedMemoryMissing
from evermesh.parallelism.collectives import Phase, Point

_PREFIX = "evermesh"
POINTS: tuple[Point, ...] = (*get_args(Phase), "sum")
_SLOT_BYTES = 128
_SLOT = struct.Struct("<QQQQdddQQ")
"""Sequence number, the fields of a slot, sequence number: a torn read shows two different ones.

Writers go from the first to the last, readers from the last to the first.
"""
_LAST = _SLOT.size - 8
_TRIES = 5


class Slot(NamedTuple):
    """What one worker last wrote down."""

    generation: int
    pid: int
    step: int
    step_s: float
    compute_s: float
    longest_s: float = 0.0
    """The longest of its last steps; 0 before the first one."""
    point: int = 0
    """Where it is, as a number in ``POINTS``."""


class SharedArea:
    """A folder in shared memory that belongs to one agent, and goes with it. A context manager.

    Its board is locked (flock) while the agent lives: the next agent removes what killed ones have left.

    Raises:
        SharedMemoryMissing: there is no room for it; nothing is left.
    """

    def __init__(self, name: str, slots: int) -> None:
        self._root = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
        self.directory = self._root / f"{_PREFIX}-{os.getuid()}-{name}"
        self.num_bytes = max(slots, 1) * _SLOT_BYTES
        self._descriptor: int | None = None
        _sweep(self._root)
        self.make()

    @property
    def board(self) -> Path:
        """The file with the slots."""
        return self.directory / "board"

    @property
    def free_bytes(self) -> int:
        """What the file system of shared memory has left, for others too."""
        return shutil.disk_usage(self._root).free

    def make(self) -> None:
        """Make it, once more if it is gone: some systems remove what users who log out have in shared memory.

        Raises:
            SharedMemoryMissing: there is no room for it; nothing is left.
        """
        self.close()
        try:
            self.directory.mkdir(mode=0o700)
            self._descriptor = _reserve(self.board, self.num_bytes)
        except OSError as error:
            self.close()
            raise SharedMemoryMissing(
                f"{self.num_bytes} bytes of shared memory cannot be had in {self._root} "
                f"({self.free_bytes:,} free): {error.strerror}. Make it larger (docker: --shm-size)."
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.directory, ignore_errors=True)
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


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
        for start, end in ((0, 8), (8, _LAST), (_LAST, len(packed))):
            self._memory[offset + start : offset + end] = packed[start:end]

    def read(self, place: int) -> Slot | None:
        """The slot of local rank ``place``; None when it is being written all the time."""
        offset = place * _SLOT_BYTES
        for _ in range(_TRIES):
            last = self._memory[offset + _LAST : offset + _LAST + 8]
            _, *values, _ = _SLOT.unpack_from(self._memory, offset)
            if self._memory[offset : offset + 8] == last:
                return Slot(*values)
        return None

    def close(self) -> None:
        """Unmap the file."""
        self._memory.close()


def _reserve(path: Path, num_bytes: int) -> int:
    """Make a locked file of this size; it appears when all that is done. Returns its descriptor."""
    new = path.with_suffix(".new")
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        os.posix_fallocate(descriptor, 0, num_bytes)
        new.rename(path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sweep(root: Path) -> None:
    """Remove the areas of this user whose agents are gone."""
    for board in root.glob(f"{_PREFIX}-{os.getuid()}-*/board"):
        with suppress(OSError), board.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while the agent lives
            shutil.rmtree(board.parent, ignore_errors=True)
