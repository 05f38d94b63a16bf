"""What a reader of files that others wrote asks of a place, in a file system or an object store alike."""

import io
import os
from pathlib import Path
from typing import Any, BinaryIO, cast

from evermesh.checkpoint.stores.places import Place
from evermesh.checkpoint.stores.store import objects_of, store_of

_LOOK_AHEAD_BYTES = 1 << 16
"""Of an object that is read in small steps: what one request fetches at least."""


def is_file(place: Place) -> bool:
    """Whether there is a file."""
    if isinstance(place, Path):
        return place.is_file()
    try:
        objects_of(place).num_bytes(place)
    except FileNotFoundError:
        return False
    return True


def is_folder(place: Place) -> bool:
    """Whether there is a folder; in an object store, whether anything is below it."""
    if isinstance(place, Path):
        return place.is_dir()
    return bool(objects_of(place).names(place) or objects_of(place).folders(place))


def files_in(folder: Place) -> list[Place]:
    """The files in a folder, by their names; none if it is missing."""
    if isinstance(folder, Path):
        return [*sorted(path for path in folder.iterdir() if path.is_file())] if folder.is_dir() else []
    return [folder / name for name in objects_of(folder).names(folder)]


def files_below(folder: Place) -> list[Place]:
    """The files in a folder and in all folders below it, by their names."""
    return [folder / name for name in sorted(store_of(folder).sizes(folder))]


def num_bytes(file: Place) -> int:
    """Of a file. Raises ``FileNotFoundError``."""
    return file.stat().st_size if isinstance(file, Path) else objects_of(file).num_bytes(file)


def name_below(root: Place, file: Place) -> str:
    """How a file is called from a folder that it is below; its own name if it is not."""
    before = f"{root}/"
    return str(file).removeprefix(before) if str(file).startswith(before) else file.name


def opened(file: Place) -> BinaryIO:
    """A file to be read at any position. A context manager. Raises ``FileNotFoundError``."""
    if isinstance(file, Path):
        return file.open("rb")
    return cast(BinaryIO, io.BufferedReader(_ObjectStream(file), _LOOK_AHEAD_BYTES))


class _ObjectStream(io.RawIOBase):
    """An object as a stream; every read is a request."""

    def __init__(self, file: Place) -> None:
        self._object, self._at = store_of(file).open(file), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + (0, self._at, self._object.num_bytes)[whence]
        if at < 0:
            raise ValueError("a position before the start")
        self._at = at
        return at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._object.num_bytes - self._at))
        if size:
            self._object.read_at(self._at, [memoryview(buffer)[:size]])
            self._at += size
        return size

    def close(self) -> None:
        if not self.closed:
            self._object.close()
        super().close()
