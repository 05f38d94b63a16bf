"""Writing files so that a crash at any byte is harmless, with checksums computed on the way."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import xxhash

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ByteArray: TypeAlias = "npt.NDArray[np.uint8]"

CHUNK_BYTES = 1 << 20
"""Bytes that share one checksum."""
_AHEAD_BYTES = 8 << 20
"""The disk begins to write when so many more bytes are there, instead of at the end."""
_STEP_BYTES = 1 << 18
"""Written, then hashed."""
DIGITS = 16
"""Hexadecimal digits of one checksum (xxh3-64)."""


class ChecksummedFile:
    """A new file whose chunk checksums are known when it is closed. A context manager; not collective."""

    def __init__(self, path: Path) -> None:
        self.num_bytes, self._handed_over = 0, 0
        self._digest, self._checksums = xxhash.xxh3_64(), list[str]()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def __enter__(self) -> "ChecksummedFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def write(self, payload: memoryview | bytes) -> None:
        """Append bytes. Raises ``OSError`` as the system does; the file is then incomplete."""
        rest = memoryview(payload)
        while rest.nbytes:
            written = os.write(self._descriptor, rest[:_STEP_BYTES])
            self._add(rest[:written])  # while they are in the cache of the core: twice as quick as from memory
            self._hand_over()
            rest = rest[written:]

    def finish(self) -> str:
        """Return when the bytes are on the disk: the checksums of all chunks, one after the other."""
        os.fsync(self._descriptor)
        if self.num_bytes % CHUNK_BYTES:
            self._checksums.append(self._digest.hexdigest())
        return "".join(self._checksums)

    def _hand_over(self) -> None:
        """Let the disk work while the next bytes are hashed and copied: what is dirty in the range is written at once."""
        waiting = self.num_bytes - self._handed_over
        if waiting >= _AHEAD_BYTES:
            os.posix_fadvise(self._descriptor, self._handed_over, waiting, os.POSIX_FADV_DONTNEED)
            self._handed_over = self.num_bytes

    def _add(self, written: memoryview) -> None:
        while written.nbytes:
            room = CHUNK_BYTES - self.num_bytes % CHUNK_BYTES
            part = written[:room]
            self._digest.update(part)
            self.num_bytes += part.nbytes
            written = written[room:]
            if self.num_bytes % CHUNK_BYTES == 0:
                self._checksums.append(self._digest.hexdigest())
                self._digest.reset()


def write_checksummed(path: Path, payloads: Iterable[memoryview | bytes]) -> tuple[int, str]:
    """Write a new file durably; return its size in bytes and its chunk checksums."""
    with ChecksummedFile(path) as file:
        for payload in payloads:
            file.write(payload)
        checksums = file.finish()
    return file.num_bytes, checksums


def write_durably(path: Path, payloads: Sequence[bytes]) -> None:
    """Write a new small file and return when it is on the disk; its name may not be (``sync_directory``)."""
    write_checksummed(path, payloads)


def sync_directory(path: Path) -> None:
    """Return when the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
