"""What members of a stripe say to each other: a header of 32 bytes, little-endian, and a payload whose length both ends
know.

    kind 1, nothing 3, row 4, step 8, generation 8, length 8

A receiver says how long a payload may be before it reads it; nothing is allocated by what a stranger claims.
"""

import struct
from collections.abc import Generator
from enum import IntEnum
from typing import NamedTuple

import xxhash

from evermesh.fault.snapshot.stripes.errors import SnapshotsDiffer, TransferFailed
from evermesh.fault.snapshot.stripes.payload import Payload

_HEADER = struct.Struct("<BxxxIQQQ")


class Kind(IntEnum):
    """Of a frame."""

    PROTECT = 1
    """Begins to protect; the digests of the sender's data. ``row`` is unused, ``length`` the bytes of the payload."""
    REBUILD = 2
    """Begins to rebuild; what the sender holds, and which of its chunks are corrupt."""
    RECORD = 3
    """The record of the snapshot, for a member that has none."""
    CHUNK = 4
    """What the sender has in ``row``, or what it computed for the receiver."""
    DONE = 5
    """The sender has all it needs; the digests of its parity, where it was protected."""
    TELL = 6
    """Something that the caller has to say to all."""
    COPIED = 7
    """The sender has one more of the copies that it lacked."""


class Header(NamedTuple):
    """Of a frame."""

    kind: int
    row: int
    step: int
    generation: int
    length: int


class Transfer(NamedTuple):
    """What every frame of a transfer repeats."""

    step: int
    generation: int

    def header(self, kind: Kind, length: int, row: int = 0) -> memoryview:
        """A header to send."""
        return memoryview(_HEADER.pack(kind, row, self.step, self.generation, length))


def frame(transfer: Transfer, kind: Kind, payload: bytes) -> Generator[memoryview | None, None, None]:
    """Send one frame."""
    yield memoryview(transfer.header(kind, len(payload)).tobytes() + payload)


def chunk(transfer: Transfer, row: int, payload: Payload) -> Generator[memoryview | None, None, None]:
    """Send a chunk."""
    yield transfer.header(Kind.CHUNK, payload.nbytes, row)
    yield from payload.views


def read_header(transfer: Transfer, kind: Kind, sender: int) -> Generator[memoryview | None, int, Header]:
    """Receive the header of a frame of this kind.

    Raises:
        SnapshotsDiffer: it belongs to another step, generation or operation.
    """
    buffer = yield from read_exactly(_HEADER.size)
    header = Header(*_HEADER.unpack(buffer))
    if (header.kind, header.step, header.generation) != (kind, *transfer):
        raise SnapshotsDiffer(
            f"member {sender} sent a frame of kind {header.kind} of step {header.step} (generation {header.generation}); "
            f"expected was {kind.name} ({kind.value}) of step {transfer.step} (generation {transfer.generation}).",
            (sender,),
        )
    return header


def read_frame(
    transfer: Transfer, kind: Kind, sender: int, least_bytes: int, most_bytes: int
) -> Generator[memoryview | None, int, bytearray]:
    """Receive a whole frame.

    Raises:
        SnapshotsDiffer: as :func:`read_header`.
        TransferFailed: its payload is shorter than ``least_bytes`` or longer than ``most_bytes``; it is not read then.
    """
    header = yield from read_header(transfer, kind, sender)
    if not least_bytes <= header.length <= most_bytes:
        raise TransferFailed(
            f"member {sender} announced {header.length:,} bytes ({kind.name}); there must be {least_bytes:,} to "
            f"{most_bytes:,}.",
            (sender,),
        )
    return (yield from read_exactly(header.length))


def read_exactly(num_bytes: int) -> Generator[memoryview | None, int, bytearray]:
    """Receive so many bytes."""
    buffer = bytearray(num_bytes)
    rest = memoryview(buffer)
    while rest.nbytes:
        count = yield rest
        rest = rest[count:]
    return buffer


def read_into(payload: Payload) -> Generator[memoryview | None, int, int]:
    """Receive all bytes of ``payload`` there; returns their xxh3-64."""
    digest = xxhash.xxh3_64()
    for view in payload.views:
        rest = view
        while rest.nbytes:
            count = yield rest
            digest.update(rest[:count])
            rest = rest[count:]
    return digest.intdigest()
