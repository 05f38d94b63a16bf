"""Files of local and shared file systems."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evermesh.checkpoint.stores.places import Place

_AHEAD_BYTES = 8 << 20
"""The disk begins to write when so many more bytes are there, instead of at the end."""


class LocalStore:
    """What the system calls do."""

    def read(self, file: "Place") -> bytes:
        """All bytes of a small file. Raises ``FileNotFoundError``."""
        return Path(str(file)).read_bytes()

    def first_lines(self, files: Sequence["Place"], most_bytes: int) -> list[bytes]:
        """The first lines of text files, their ends included; each is at most ``most_bytes`` long. Raises
        ``FileNotFoundError``."""
        return [_first_line(Path(str(file)), most_bytes) for file in files]

    def open(self, file: "Place") -> "OpenLocalFile":
        """Raises ``FileNotFoundError``."""
        return OpenLocalFile(Path(str(file)))

    def create(self, file: "Place") -> "NewLocalFile":
        """Begin a file that does not exist."""
        return NewLocalFile(Path(str(file)))

    def sizes(self, folder: "Place") -> dict[str, int]:
        """Bytes of all files below a folder, by their path from there; none if it is missing."""
        root = Path(str(folder))
        files = (Path(below) / name for below, _, names in os.walk(root) for name in names)
        return {path.relative_to(root).as_posix(): path.stat().st_size for path in files if path.exists()}

    def folders(self, folder: "Place") -> list[str]:
        """Names of the folders in a folder; none if it is missing."""
        root = Path(str(folder))
        return sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []

    def written_s(self, file: "Place") -> float:
        """When a file was written, seconds since 1970. Raises ``FileNotFoundError``."""
        return Path(str(file)).stat().st_mtime


class OpenLocalFile:
    """Reads straight into the buffers."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.num_bytes = os.fstat(self._descriptor).st_size

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """The system reads ahead by itself."""

    def read_at(self, position: int, buffers: Sequence[memoryview]) -> int:
        """Fill ``buffers``, at most 1024, with the bytes from ``position`` on."""
        rest, total = list(buffers), 0
        while rest:
            num_bytes = os.preadv(self._descriptor, rest, position)
            if not num_bytes and any(view.nbytes for view in rest):
                raise EOFError(position)
            position += num_bytes
            total += num_bytes
            while rest and num_bytes >= rest[0].nbytes:
                num_bytes -= rest.pop(0).nbytes
            if rest:
                rest[0] = rest[0][num_bytes:]
        return total

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)


class NewLocalFile:
    """A new file; there is none of its name."""

    def __init__(self, path: Path) -> None:
        self._num_bytes, self._handed_over = 0, 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, payload: memoryview) -> None:
        """Append bytes. Raises ``OSError`` as the system does; the file is then incomplete."""
        while payload.nbytes:
            written = os.write(self._descriptor, payload)
            self._num_bytes += written
            self._hand_over()
            payload = payload[written:]

    def show(self) -> None:
        """Return when other hosts see what was written: network file systems send it when any descriptor is closed."""
        os.close(os.dup(self._descriptor))

    def finish(self) -> None:
        """Return when the bytes are on the disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)

    def _hand_over(self) -> None:
        """Let the disk work while the next bytes are hashed and copied: what is dirty in the range is written at once."""
        waiting = self._num_bytes - self._handed_over
        if waiting >= _AHEAD_BYTES:
            os.posix_fadvise(self._descriptor, self._handed_over, waiting, os.POSIX_FADV_DONTNEED)
            self._handed_over = self._num_bytes


def _first_line(path: Path, most_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.readline(most_bytes)
