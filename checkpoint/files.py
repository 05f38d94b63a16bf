"""Writing files so that a crash at any byte is harmless, with checksums computed on the way."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import xxhash

from evermesh.checkpoint.stores.places import Place
from evermesh.checkpoint.stores.store import store_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

ByteArray: TypeAlias = "npt.NDArray[np.uint8]"

CHUNK_BYTES = 1 << 20
"""Bytes that share one checksum."""
_STEP_BYTES = 1 << 18
"""Written, then hashed."""
DIGITS = 16
"""Hexadecimal digits of one checksum (xxh3-64)."""


class ChecksummedFile:
    """A new file whose chunk checksums are known when it is closed. A context manager; not collective."""

    def __init__(self, path: Place) -> None:
        self.num_bytes = 0
        self._digest, self._checksums = xxhash.xxh3_64(), list[str]()
        self._file = store_of(path).create(path)

    def __enter__(self) -> "ChecksummedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, payload: memoryview | bytes) -> None:
        """Append bytes. Raises ``OSError`` as the system or the store does; the file is then incomplete."""
        view = memoryview(payload)
        for begin in range(0, view.nbytes, _STEP_BYTES):
            step = view[begin : begin + _STEP_BYTES]
            self._file.write(step)
            self._add(step)  # while they are in the cache of the core: twice as quick as from memory

    def finish(self) -> str:
        """Return when the bytes are durable: the checksums of all chunks, one after the other."""
        self._file.finish()
        if self.num_bytes % CHUNK_BYTES:
            self._checksums.append(self._digest.hexdigest())
        return "".join(self._checksums)

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


def write_checksummed(path: Place, payloads: Iterable[memoryview | bytes]) -> tuple[int, str]:
    """Write a new file durably; return its size in bytes and its chunk checksums."""
    with ChecksummedFile(path) as file:
        for payload in payloads:
            file.write(payload)
        checksums = file.finish()
    return file.num_bytes, checksums


def write_durably(path: Place, payloads: Sequence[bytes]) -> None:
    """Write a new small file and return when it is durable; on a disk its name may not be (``sync_directory``)."""
    write_checksummed(path, payloads)


def sync_directory(path: Path) -> None:
    """Return when the names in a directory are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
