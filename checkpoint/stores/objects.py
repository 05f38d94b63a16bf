"""Objects of any store that fsspec knows. Imported when a URL is used."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import fsspec
from fsspec.asyn import sync

from evermesh.checkpoint.errors import StoreUnusable
from evermesh.checkpoint.stores.places import ObjectPath, Place
from evermesh.checkpoint.stores.read_ahead import ReadAhead
from evermesh.checkpoint.stores.retrying import patiently

if TYPE_CHECKING:
    from evermesh.checkpoint.stores.store import NewFile

READS_IN_FLIGHT = 8
"""Of all files of a process."""
_LONGEST_REQUEST_S = 60.0
"""Of one that moves a few MiB."""
_MOST_DELETED = 1000
"""By one request, a limit of S3."""


class ObjectStore:
    """A client of one store; its endpoint and credentials are what the environment and the configuration of fsspec say.

    Every request is tried again for the patience of its place, here and nowhere below.
    """

    def __init__(self, protocol: str) -> None:
        self.protocol = protocol
        try:
            self.fs: Any = fsspec.filesystem(protocol, skip_instance_cache=True, **self._options())
        except ImportError as error:
            extra = "pip install 'evermesh[s3]'" if protocol in ("s3", "s3a") else "Install what it names"
            raise StoreUnusable(
                ObjectPath(f"{protocol}://"), "opening", f"{error}", 1, 0.0, f"{extra}, or use a directory."
            ) from error
        except ValueError as error:  # no such protocol
            fact = f"{error}"
            raise StoreUnusable(
                ObjectPath(f"{protocol}://"), "opening", fact, 1, 0.0, "Write s3://BUCKET/PREFIX, or use a directory."
            ) from error
        self._readers = ThreadPoolExecutor(READS_IN_FLIGHT, thread_name_prefix="store-read")

    def _options(self) -> dict[str, Any]:
        return {"use_listings_cache": False}

    def read(self, file: Place) -> bytes:
        """All bytes of a small object. Raises ``FileNotFoundError``."""
        return patiently(_object(file), "reading", lambda: bytes(self.ask(file, "cat_file", _path(file))))

    def first_lines(self, files: Sequence[Place], most_bytes: int) -> list[bytes]:
        """The first lines of text files, their ends included; each is at most ``most_bytes`` long. Raises
        ``FileNotFoundError``. Several are read at a time."""
        return list(self._readers.map(lambda file: self._first_line(_object(file), most_bytes), files))

    def open(self, file: Place) -> "OpenObject":
        """Raises ``FileNotFoundError``."""
        return OpenObject(self, _object(file))

    def read_range(self, file: ObjectPath, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of an object, which has them."""

        def request() -> bytes:
            found: bytes = self.ask(file, "cat_file", _path(file), start=start, end=stop)
            if len(found) != stop - start:
                raise ConnectionError(f"{len(found):,} of {stop - start:,} bytes came")
            return found

        return patiently(file, f"reading bytes {start:,} to {stop:,} of", request)

    def create(self, file: Place) -> "NewFile":
        """Begin an object; it is there when it is finished."""
        return StreamedObject(self, _object(file))

    def put(self, file: ObjectPath, payload: bytes) -> None:
        """Make a small object, or replace one, at once."""
        patiently(file, "writing", lambda: self.ask(file, "pipe_file", _path(file), payload))

    def num_bytes(self, file: ObjectPath) -> int:
        """Of an object. Raises ``FileNotFoundError``."""
        return int(self._entry(file)["size"])

    def written_s(self, file: Place) -> float:
        """When an object was written, seconds since 1970, by the clock of the store. Raises ``FileNotFoundError``."""
        return float(patiently(_object(file), "looking at", lambda: self.fs.modified(_path(file)).timestamp()))

    def sizes(self, folder: Place) -> dict[str, int]:
        """Bytes of all objects below a folder, by their path from there; none if it is missing."""
        found = patiently(_object(folder), "listing", lambda: self.ask(folder, "find", _path(folder), detail=True))
        root = _path(folder).strip("/") + "/"
        entries = ((str(name).lstrip("/"), entry) for name, entry in found.items())
        return {name[len(root) :]: int(entry["size"]) for name, entry in entries if name.startswith(root)}

    def folders(self, folder: Place) -> list[str]:
        """Names of the folders in a folder; none if it is missing."""
        return [name for name, is_folder in self._entries(_object(folder)) if is_folder]

    def names(self, folder: ObjectPath) -> list[str]:
        """Names of the objects in a folder; none if it is missing."""
        return [name for name, is_folder in self._entries(folder) if not is_folder]

    def delete(self, files: Iterable[ObjectPath]) -> None:
        """Delete objects; those that are gone are no error."""
        left = list(files)
        for begin in range(0, len(left), _MOST_DELETED):
            batch = left[begin : begin + _MOST_DELETED]
            patiently(batch[0], f"deleting {len(batch)} objects such as", partial(self._delete, batch))

    def discard(self, folder: ObjectPath) -> None:
        """Delete all objects below a folder."""
        self.delete(folder / name for name in self.sizes(folder))

    def abort_uploads(self, folder: ObjectPath, concerns: Callable[[str], bool]) -> None:
        """Let the store forget what was uploaded below ``folder`` and never finished, to keys that ``concerns`` holds for."""

    def ask(self, place: Place, method: str, *arguments: Any, **fields: Any) -> Any:
        """One call of the file system, which ends: a timeout of its library does not cover all that can stand still."""
        assert isinstance(place, ObjectPath)
        coroutine = getattr(self.fs, f"_{method}", None) if self.fs.async_impl else None
        if coroutine is None:
            return getattr(self.fs, method)(*arguments, **fields)
        limit_s = min(place.patience_s, _LONGEST_REQUEST_S)
        return sync(self.fs.loop, _within, limit_s, coroutine, *arguments, **fields)

    def ahead(self, file: ObjectPath, ranges: Sequence[tuple[int, int]]) -> ReadAhead:
        """Fetch ranges of an object before they are asked for."""
        return ReadAhead(self._readers, lambda start, stop: self.read_range(file, start, stop), ranges)

    def _first_line(self, file: ObjectPath, most_bytes: int) -> bytes:
        def request() -> bytes:
            found = bytes(self.ask(file, "cat_file", _path(file), start=0, end=most_bytes))
            if b"\n" not in found:
                raise ConnectionError(f"{len(found):,} bytes came, and no end of a line")
            return found[: found.index(b"\n") + 1]

        return patiently(file, "reading the beginning of", request)

    def _entry(self, file: ObjectPath) -> dict[str, Any]:
        entry: dict[str, Any] = patiently(file, "looking at", lambda: self.ask(file, "info", _path(file)))
        if entry["type"] != "file":
            raise FileNotFoundError(f"{file} is no object")
        return entry

    def _entries(self, folder: ObjectPath) -> list[tuple[str, bool]]:
        try:
            found = patiently(folder, "listing", lambda: self.ask(folder, "ls", _path(folder), detail=True))
        except FileNotFoundError:
            return []
        paths = ((str(entry["name"]).rstrip("/"), entry["type"] == "directory") for entry in found)
        return sorted((path.rpartition("/")[2], is_folder) for path, is_folder in paths)

    def _delete(self, files: Sequence[ObjectPath]) -> None:
        for file in files:
            if self.fs.exists(_path(file)):
                self.fs.rm_file(_path(file))


async def _within(limit_s: float, method: Callable[..., Any], *arguments: Any, **fields: Any) -> Any:
    try:
        return await asyncio.wait_for(method(*arguments, **fields), limit_s)
    except TimeoutError as error:
        raise TimeoutError(f"no end after {limit_s:.0f} s") from error


class OpenObject:
    """An object whose ranges are read, several at a time."""

    def __init__(self, store: ObjectStore, file: ObjectPath) -> None:
        self._store, self._file = store, file
        self.num_bytes = store.num_bytes(file)
        self._ahead: ReadAhead | None = None

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch what will be read; ranges that follow each other by one request."""
        self.close()
        self._ahead = self._store.ahead(self._file, ranges)

    def read_at(self, position: int, buffers: Sequence[memoryview]) -> int:
        """Fill ``buffers`` with the bytes from ``position`` on."""
        total = sum(view.nbytes for view in buffers)
        if position + total > self.num_bytes:
            raise EOFError(self.num_bytes)
        for view in buffers:
            while view.nbytes:
                piece = self._piece(position, view.nbytes)
                view[: piece.nbytes] = piece
                view, position = view[piece.nbytes :], position + piece.nbytes
        return total

    def close(self) -> None:
        """Give up what was fetched ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _piece(self, position: int, most: int) -> memoryview:
        piece = self._ahead.piece(position) if self._ahead is not None else None
        if piece is None:
            piece = memoryview(self._store.read_range(self._file, position, position + most))
        return piece[:most]


class StreamedObject:
    """An object that is written as its store can; an error in between cannot be mended."""

    def __init__(self, store: ObjectStore, file: ObjectPath) -> None:
        self._file, self._is_open = file, True
        self._stream: Any = patiently(file, "writing", lambda: store.fs.open(_path(file), "wb"))

    def write(self, payload: memoryview) -> None:
        """Append bytes."""
        self._stream.write(payload)

    def show(self) -> None:
        """Nobody sees it yet."""

    def finish(self) -> None:
        """Return when the object is there."""
        self._is_open = False
        self._stream.close()

    def close(self) -> None:
        """Give up what was not finished."""
        if self._is_open:
            self._is_open = False
            self._stream.discard()


def _object(place: Place) -> ObjectPath:
    assert isinstance(place, ObjectPath), place
    return place


def _path(place: Place) -> str:
    """As fsspec names it."""
    return str(place).partition("://")[2]
