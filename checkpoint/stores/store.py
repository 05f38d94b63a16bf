"""What a checkpoint needs of the place it is in."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from evermesh.checkpoint.stores.local import LocalStore
from evermesh.checkpoint.stores.places import ObjectPath, Place

if TYPE_CHECKING:
    from evermesh.checkpoint.stores.objects import ObjectStore


class OpenFile(Protocol):
    """A file whose bytes are read at any place."""

    num_bytes: int

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Tell which bytes [start, stop) will be read, ascending; where that takes long they are fetched ahead."""

    def read_at(self, position: int, buffers: Sequence[memoryview]) -> int:
        """Fill ``buffers`` with the bytes from ``position`` on; returns how many were read. Raises ``EOFError`` where the
        file ends before."""

    def close(self) -> None:
        """Let go of it."""


class NewFile(Protocol):
    """A file that is written from its beginning to its end."""

    def write(self, payload: memoryview) -> None:
        """Append bytes."""

    def show(self) -> None:
        """Return when others see what was written, durable or not; an object is seen when it is finished."""

    def finish(self) -> None:
        """Return when all bytes are durable."""

    def close(self) -> None:
        """Let go of it; what was not finished is no file, or an incomplete one."""


class Store(Protocol):
    """Files and folders; an error is an ``OSError`` that names the file."""

    def read(self, file: "Place") -> bytes:
        """All bytes of a small file. Raises ``FileNotFoundError``."""

    def first_lines(self, files: Sequence["Place"], most_bytes: int) -> list[bytes]:
        """The first lines of text files, their ends included; each is at most ``most_bytes`` long. Raises
        ``FileNotFoundError``."""

    def open(self, file: "Place") -> OpenFile:
        """Raises ``FileNotFoundError``."""

    def create(self, file: "Place") -> NewFile:
        """Begin a file that does not exist."""

    def sizes(self, folder: "Place") -> dict[str, int]:
        """Bytes of all files below a folder, by their path from there; none if it is missing."""

    def folders(self, folder: "Place") -> list[str]:
        """Names of the folders in a folder; none if it is missing."""

    def written_s(self, file: "Place") -> float:
        """When a file was written, seconds since 1970. Raises ``FileNotFoundError``."""


def store_of(place: Place) -> Store:
    """What does the work for a place."""
    return _LOCAL if isinstance(place, Path) else objects_of(place)


def objects_of(place: ObjectPath) -> "ObjectStore":
    """The object store of a place; one for all places of a protocol in this process."""
    return _object_store(place.protocol, os.getpid())


@functools.cache
def _object_store(protocol: str, pid: int) -> "ObjectStore":
    """By process: connections and threads do not survive a fork."""
    from evermesh.checkpoint.stores.objects import ObjectStore
    from evermesh.checkpoint.stores.s3 import S3Store

    return S3Store(protocol) if protocol in ("s3", "s3a") else ObjectStore(protocol)


_LOCAL = LocalStore()
