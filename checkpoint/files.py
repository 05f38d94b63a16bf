"""Writing files so that a crash at any byte is harmless, with checksums computed on the way."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
_SYNCED_AT_ONCE = 4
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
        self.close()

    def write(self, payload: memoryview | bytes) -> None:
        """Append bytes. Raises ``OSError`` as the system or the store does; the file is then incomplete."""
        view = memoryview(payload)
        for begin in range(0, view.nbytes, _STEP_BYTES):
            step = view[begin : begin + _STEP_BYTES]
            self._file.write(step)
            self._add(step)  # while they are in the cache of the core: twice as quick as from memory

    def show(self) -> None:
        """Return when others see what was written, durable or not."""
        self._file.show()

    def finish(self) -> None:
        """Return when the bytes are durable."""
        self._file.finish()

    def checksums(self) -> str:
        """Those of all chunks, one after the other, when all bytes are written."""
        last = [self._digest.hexdigest()] if self.num_bytes % CHUNK_BYTES else []
        return "".join([*self._checksums, *last])

    def close(self) -> None:
        """Let go of it."""
        self._file.close()

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
        file.finish()
    return file.num_bytes, file.checksums()


class LateFiles:
    """New files that become durable together: a disk that keeps a journal then commits it once, not once for each.

    Others see what was written at once. An object is durable as soon as it is there. A context manager.
    """

    def __init__(self) -> None:
        self._files: list[ChecksummedFile] = []
        self._syncing: list[Future[None]] = []
        self._pool = ThreadPoolExecutor(_SYNCED_AT_ONCE, thread_name_prefix="checkpoint-sync")

    def __enter__(self) -> "LateFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for file in self._files:
            file.close()

    def write(self, path: Place, payloads: Iterable[memoryview | bytes]) -> tuple[int, str]:
        """Write a new file; return its size in bytes and its chunk checksums."""
        if not isinstance(path, Path):
            return write_checksummed(path, payloads)
        self._files.append(file := ChecksummedFile(path))
        for payload in payloads:
            file.write(payload)
        file.show()
        return file.num_bytes, file.checksums()

    def begin_sync(self) -> None:
        """Let the disk begin with what was written so far."""
        self._syncing += [self._pool.submit(file.finish) for file in self._files[len(self._syncing) :]]

    def sync(self) -> None:
        """Return when all files are durable. Raises ``OSError`` as the system does."""
        self.begin_sync()
        for syncing in self._syncing:
            syncing.result()


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
