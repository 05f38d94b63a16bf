"""Where a node keeps parity for its stripe: two buffers, so that one stays whole while the other is filled.

AREA/parity-0/parity       chunks of parity, allocated like slots
              record       of the stripe: lengths and digests of all members
              protected    which snapshot it is of, and of what the data of every member consist; written last, goes first
    /parity-1/...
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from evermesh.checkpoint.background.memory import allocate
from evermesh.fault.snapshot.choosing import Version
from evermesh.fault.snapshot.keeper.portions import Portion, holds, mapped

_NUM_BUFFERS = 2


class Protected(NamedTuple):
    """A snapshot that a stripe protects, as one of its members knows it."""

    version: Version
    stripe: str
    member: int
    """Rank in the stripe of whoever knows this."""
    code: str
    portions: tuple[tuple[Portion, ...], ...]
    """By member."""
    coded_bytes: tuple[int, ...]
    """By member: of what it holds, that which it codes; the rest others hold too."""

    @property
    def data_bytes(self) -> int:
        """That this member holds."""
        return sum(portion.num_bytes for portion in self.portions[self.member])

    @property
    def longest(self) -> int:
        """Bytes that the member codes which codes most."""
        return max(self.coded_bytes)

    def values(self) -> dict[str, Any]:
        """As JSON; ``read`` reads it."""
        return {**self._asdict(), "version": list(self.version)}

    @classmethod
    def read(cls, values: dict[str, Any]) -> "Protected":
        """Raises ``LookupError``, ``TypeError`` or ``ValueError`` if it is none."""
        portions = tuple(tuple(Portion(*part) for part in of_member) for of_member in values["portions"])
        version = Version(*values["version"])
        coded_bytes = tuple(map(int, values["coded_bytes"]))
        return cls(version, values["stripe"], values["member"], values["code"], portions, coded_bytes)


class ParityBuffer:
    """One of the buffers of ``area``."""

    def __init__(self, area: Path, number: int) -> None:
        self._folder = area / f"parity-{number}"
        self._parity, self._record, self._protected = (
            self._folder / name for name in ("parity", "record", "protected")
        )

    def protected(self) -> Protected | None:
        """What it is parity of; None: nothing, or what it says is not what was written."""
        try:
            digest, _, text = self._protected.read_text().partition("\n")
            return Protected.read(json.loads(text)) if digest == xxhash.xxh3_64_hexdigest(text.encode()) else None
        except (OSError, LookupError, TypeError, ValueError):
            return None

    def record(self) -> bytes:
        """The record of the stripe. Raises ``OSError``."""
        return self._record.read_bytes()

    def make_room(self, num_bytes: int) -> None:
        """Forget what it is parity of, and have so many bytes.

        Raises:
            RoomMissing: there are not so many; it has none then.
        """
        self.forget()
        if self._parity.is_file() and self._parity.stat().st_size == num_bytes:
            return
        self.release()
        self._folder.mkdir(mode=0o700)
        try:
            descriptor = os.open(self._parity, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                allocate(descriptor, num_bytes)
            finally:
                os.close(descriptor)
        except OSError:
            self.release()
            raise

    def forget(self) -> None:
        """Be parity of nothing."""
        self._protected.unlink(missing_ok=True)

    @contextmanager
    def opened(self) -> Iterator[memoryview]:
        """Its parity, to be read and written."""
        with mapped(self._parity, self._parity.stat().st_size) as memory:
            yield memory

    def hold(self, protected: Protected, record: bytes) -> None:
        """Say what it is parity of."""
        self._record.write_bytes(record)
        text = json.dumps(protected.values(), separators=(",", ":"))
        new = self._folder / "protected.new"
        new.write_text(f"{xxhash.xxh3_64_hexdigest(text.encode())}\n{text}")
        new.rename(self._protected)

    def release(self) -> None:
        """Give its memory back."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self._folder)


def buffer_of(area: Path, version: Version) -> ParityBuffer | None:
    """The buffer with parity of a snapshot that the slots of this node still hold."""
    for buffer in _buffers(area):
        found = buffer.protected()
        if found is not None and found.version == version and holds(area, version, found.portions[found.member]):
            return buffer
    return None


def free_buffer(area: Path) -> ParityBuffer:
    """The buffer to be filled next: one that protects nothing which the slots hold, else the one with the older snapshot."""
    usable = {one.version for one in protected_in(area)}

    def worth(buffer: ParityBuffer) -> Version:
        found = buffer.protected()
        return Version(-1, -1, "") if found is None or found.version not in usable else found.version

    return min(_buffers(area), key=worth)


def protected_in(area: Path) -> list[Protected]:
    """The protected snapshots whose part of this node is whole, as far as headers and sizes tell."""
    found = [buffer.protected() for buffer in _buffers(area)]
    return [one for one in found if one is not None and holds(area, one.version, one.portions[one.member])]


def release_parity(area: Path) -> None:
    """Give the memory of all buffers back."""
    for buffer in _buffers(area):
        buffer.release()


def _buffers(area: Path) -> list[ParityBuffer]:
    return [ParityBuffer(area, number) for number in range(_NUM_BUFFERS)]
