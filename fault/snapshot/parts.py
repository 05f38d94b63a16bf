"""The part of one rank of a snapshot, in the memory of this node or of another one."""

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any, Protocol

import xxhash
from pydantic import JsonValue

from evermesh.checkpoint.committing import data_name
from evermesh.checkpoint.encoding import index_head
from evermesh.checkpoint.errors import CheckpointCorrupt
from evermesh.checkpoint.stores.local import LocalStore
from evermesh.checkpoint.stores.store import OpenFile
from evermesh.fault.snapshot.choosing import Version
from evermesh.fault.snapshot.keeper.slots import Held, Record, SlotFiles
from evermesh.fault.snapshot.remote import RemoteKeeper


class Part(Protocol):
    """What a rank left: a data file, its index, and what it said besides tensors."""

    record: Record
    is_local: bool

    @property
    def folder(self) -> str:
        """Where it is, for people; the name of its data file begins with it."""

    def index(self) -> bytes:
        """The index. Raises ``OSError``."""

    def objects(self) -> bytes:
        """What the rank said. Raises ``OSError``."""

    def open(self) -> OpenFile:
        """The data file. Raises ``OSError``."""


class LocalPart:
    """In the area of the keeper of this node."""

    is_local = True

    def __init__(self, area: Path, held: Held) -> None:
        self.record, self._files = held.record, SlotFiles.of(area, held.record.rank, held.number)

    @property
    def folder(self) -> str:
        return str(self._files.folder)

    def index(self) -> bytes:
        """The index. Raises ``OSError``."""
        return self._files.index.read_bytes()

    def objects(self) -> bytes:
        """What the rank said. Raises ``OSError``."""
        return self._files.objects.read_bytes()

    def open(self) -> OpenFile:
        """The data file. Raises ``OSError``."""
        return LocalStore().open(self._files.data)


class RemotePart:
    """In the memory of another node."""

    is_local = False

    def __init__(self, keeper: RemoteKeeper, held: Held) -> None:
        self.record, self._number, self._keeper = held.record, held.number, keeper

    @property
    def folder(self) -> str:
        return f"{self._keeper.address}/rank-{self.record.rank:05d}/slot-{self._number}"

    def index(self) -> bytes:
        """The index. Raises ``KeeperUnreachable``."""
        return self._keeper.read_all(self._asked("index"))

    def objects(self) -> bytes:
        """What the rank said. Raises ``KeeperUnreachable``."""
        return self._keeper.read_all(self._asked("objects"))

    def open(self) -> OpenFile:
        """The data file; it is asked for when it is read."""
        return self._keeper.open(self._asked("data"), self.record.data_bytes)

    def _asked(self, what: str) -> dict[str, Any]:
        version = version_of(self.record)
        return {"what": what, "rank": self.record.rank, "slot": self._number, "version": version}


class Said:
    """What a rank said besides tensors. Raises ``CheckpointCorrupt`` if it is not what was sealed."""

    def __init__(self, part: Part) -> None:
        self._part = part

    @cached_property
    def values(self) -> Mapping[str, Mapping[str, JsonValue]]:
        """``objects`` and ``description``."""
        place = PurePath(self._part.folder) / "objects.json"
        try:
            payload = self._part.objects()
            line = self._part.index().partition(b"\n")[0] + b"\n"
            if xxhash.xxh3_64_hexdigest(line) != self._part.record.root:
                raise CheckpointCorrupt(Path(place), "its index is not what was sealed")
            if xxhash.xxh3_64_hexdigest(payload) != index_head(line).told["objects"]:
                raise CheckpointCorrupt(Path(place), "the checksum is wrong")
            found: Mapping[str, Mapping[str, JsonValue]] = json.loads(payload)
        except (OSError, LookupError, ValueError) as error:
            if isinstance(error, CheckpointCorrupt):
                raise
            raise CheckpointCorrupt(Path(place), f"it is not what was sealed: {error}") from error
        return found


def version_of(record: Record) -> Version:
    """The snapshot that a part belongs to."""
    return Version(record.generation, record.step, record.shard_map)


def file_of(part: Part) -> str:
    """The name of its data file among those of a snapshot."""
    return f"{part.folder}/{data_name(part.record.rank)}"
