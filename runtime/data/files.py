"""Files that are complete or absent: hashed while written, flushed to disk, committed by renaming a directory."""

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Self

import xxhash

from evermesh.runtime.data.errors import CorpusBusy, DiskFull

_BLOCK_BYTES = 1 << 20
_LOCK_POLL_S = 0.05


class HashedFile:
    """A new file whose size and xxh3-64 are known when its context ends."""

    def __init__(self, path: Path, *, durable: bool) -> None:
        """Create ``path``; with ``durable`` its bytes are on disk when the context ends."""
        self.num_bytes = 0
        self._file = create(path)
        self._hash = xxhash.xxh3_64()
        self._durable = durable

    def write(self, block: bytes | memoryview) -> int:
        """Append ``block``; return its bytes."""
        view = memoryview(block).cast("B")
        self._hash.update(view)
        self.num_bytes += view.nbytes
        return self._file.write(view)

    def append(self, path: Path) -> None:
        """Append the whole content of the file ``path``."""
        for block in _blocks(path):
            self.write(block)

    @property
    def digest(self) -> str:
        """xxh3-64 of what was written, hexadecimal."""
        return self._hash.hexdigest()

    def close(self) -> None:
        """Close the file; raises what the last write could not do."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None and self._durable:
                self._file.flush()
                os.fsync(self._file.fileno())


def create(path: Path) -> BinaryIO:
    """A new, empty, buffered binary file."""
    return path.open("wb")


def file_digest(path: Path) -> str:
    """xxh3-64 of the content of a file, hexadecimal."""
    digest = xxhash.xxh3_64()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def commit_folder(built: Path, final: Path) -> None:
    """Make the directory ``built`` appear as ``final`` at once, and durably; its files are on disk already."""
    sync_folder(built)
    built.rename(final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Return when the entries of ``folder`` are on disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def empty_folder(folder: Path) -> Path:
    """``folder`` without any content, created where it is not there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextmanager
def exclusive(path: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock file ``path``, which no other process of any node that shares the file system holds meanwhile.

    The lock ends with its process, and the file is removed when the context ends.

    Raises:
        CorpusBusy: another process held it for ``wait_s`` seconds.
    """
    deadline = time.monotonic() + wait_s
    while (handle := _try_lock(path)) is None:
        if time.monotonic() >= deadline:
            raise CorpusBusy(
                f"another process has held {path} for {wait_s:.0f} s: it prepares the same corpus. "
                f"Wait until it has ended, or choose another output."
            )
        time.sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while the lock is held: whoever opens the path next makes a new file
        os.close(handle)


def _try_lock(path: Path) -> int | None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle).st_ino == path.stat().st_ino:
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass  # held by another process, or removed by the one that held it between open and flock
    os.close(handle)
    return None


@contextmanager
def name_full_disk(folder: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into ``DiskFull``, which names ``folder`` and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise DiskFull(
            f"the disk of {folder} is full ({free / 1e6:,.0f} MB free): {error}. Finished parts are kept and there is "
            f"no corpus yet. Free space (about 2.5 times the size of the corpus) and run it again."
        ) from error


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block
