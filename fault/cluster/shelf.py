"""Where the lines of one writer go: a folder, to whose files lines are appended, or an object store, whose objects are
replaced by longer ones.

Every writer has files of its own, so that nobody's lines are lost or mixed with those of others, on any file system.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from evermesh.checkpoint.stores.places import ObjectPath, Place
from evermesh.checkpoint.stores.store import objects_of, store_of

_LARGEST_OBJECT = 1 << 18
"""Bytes of an object from which on its writer begins another: each line replaces the whole of it."""


class Shelf(Protocol):
    """Files of JSON lines by name; an error is an ``OSError``."""

    def sizes(self) -> dict[str, int]:
        """Bytes of all files, by name."""

    def read(self, name: str) -> bytes:
        """A whole file. Raises ``FileNotFoundError``."""

    def append(self, name: str, lines: bytes) -> None:
        """Add lines to a file of this writer, durable when this returns."""

    def write(self, name: str, content: bytes) -> None:
        """Make a file, whole and durable when others see it."""

    def remove(self, name: str) -> None:
        """Remove a file; one that is gone is no error."""


class FolderShelf:
    """Files below a folder, which every user who writes there may be given by its permissions."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._is_torn = folder, False

    def sizes(self) -> dict[str, int]:
        """Bytes of all files, by name."""
        return store_of(self._folder).sizes(self._folder)

    def read(self, name: str) -> bytes:
        """A whole file. Raises ``FileNotFoundError``."""
        return store_of(self._folder).read(self._folder / name)

    def append(self, name: str, lines: bytes) -> None:
        """Add lines, durable when this returns; a line that an error has cut short is ended first."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        payload = b"\n" + lines if self._is_torn else lines
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            self._is_torn = True
            written = os.write(descriptor, payload)
            if written != len(payload):
                raise OSError(f"only {written} of {len(payload)} bytes were taken by {path}")
            self._is_torn = False
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def write(self, name: str, content: bytes) -> None:
        """Make a file, whole and durable when others see it."""
        path = self._folder / name
        new = path.with_name(f".{path.name}.{os.getpid()}.new")
        try:
            with new.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            new.rename(path)
        finally:
            new.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a file, and its folder with the last one."""
        path = self._folder / name
        path.unlink(missing_ok=True)
        with suppress(OSError):  # others are in it
            path.parent.rmdir()


class ObjectShelf:
    """Objects below a prefix. What this writer has written it keeps, a quarter of a MiB at most."""

    def __init__(self, folder: ObjectPath) -> None:
        self._folder, self._store = folder, objects_of(folder)
        self._name, self._content, self._number = "", b"", 0

    def sizes(self) -> dict[str, int]:
        """Bytes of all objects, by name."""
        return self._store.sizes(self._folder)

    def read(self, name: str) -> bytes:
        """A whole object. Raises ``FileNotFoundError``."""
        return self._store.read(self._folder / name)

    def append(self, name: str, lines: bytes) -> None:
        """Add lines to the object, or to another one beside it once it is long."""
        if name != self._name:
            self._name, self._content, self._number = name, b"", 0
        if len(self._content) > _LARGEST_OBJECT:
            self._content, self._number = b"", self._number + 1
        content = self._content + lines
        stem, dot, suffix = name.rpartition(".")
        self._store.put(self._folder / (f"{stem}-{self._number}{dot}{suffix}"), content)
        self._content = content

    def write(self, name: str, content: bytes) -> None:
        """Make an object."""
        self._store.put(self._folder / name, content)

    def remove(self, name: str) -> None:
        """Remove an object."""
        self._store.delete([self._folder / name])


def shelf_of(place: Place) -> Shelf:
    """What does the work for a place.

    Raises:
        StoreUnusable: no client for its protocol is installed.
    """
    return FolderShelf(place) if isinstance(place, Path) else ObjectShelf(place)
