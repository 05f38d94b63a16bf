"""One member's part in protecting a snapshot: it sends its chunks to those that keep their parity, and adds up what
comes."""

import struct
from typing import TypeVar

import numpy as np
import xxhash

from evermesh.fault.snapshot.coding.engine import ByteArray, Engine
from evermesh.fault.snapshot.stripes.copies import Pieces
from evermesh.fault.snapshot.stripes.errors import ChunkCorrupt, SnapshotsDiffer, TransferFailed
from evermesh.fault.snapshot.stripes.frames import Kind, Transfer, chunk, frame, read_frame, read_header
from evermesh.fault.snapshot.stripes.membership import Membership
from evermesh.fault.snapshot.stripes.payload import Digests, Payload
from evermesh.fault.snapshot.stripes.pump import PIECE_BYTES, Incoming, Outgoing
from evermesh.fault.snapshot.stripes.record import StripeRecord
from evermesh.fault.snapshot.stripes.rotation import CHUNK_BYTES, Rows, parity_bytes

T = TypeVar("T")

_LENGTH = struct.Struct("<Q")


class Protection:
    """The three phases, each a pair of generators for every other member: announce, give chunks, tell the digests of
    parity.

    Args:
        data: what this member codes.
        parity: filled; as large for every member as the data of the longest needs.

    Raises:
        TransferFailed: there is no room for the parity of one's own data.
    """

    def __init__(
        self, mine: Membership, step: int, data: Payload, digests: Digests, parity: memoryview, engine: Engine
    ) -> None:
        self._mine, self._data, self._engine = mine, data, engine
        self._transfer = Transfer(step, mine.generation)
        self._parity: ByteArray = np.frombuffer(parity, np.uint8)
        self._most_chunks = self._parity.nbytes // CHUNK_BYTES // mine.code.parity * mine.code.data
        self._lengths, self._digests = {mine.rank: data.nbytes}, {mine.rank: digests}
        self._parity_digests: dict[int, Digests] = {}
        self._waiting: list[int] = []
        """Contributions that are still to come, by row."""
        self._begun: set[int] = set()
        self._scratch = memoryview(bytearray(PIECE_BYTES))  # of all connections: what comes is used up at once
        self._check_room(mine.rank, data.nbytes)

    def announce(self) -> Outgoing:
        """Say how long one's data is, and its digests."""
        digests = self._digests[self._mine.rank]
        return frame(self._transfer, Kind.PROTECT, _LENGTH.pack(self._data.nbytes) + _as_bytes(digests))

    def hear(self, peer: int) -> Incoming:
        """Learn the same of another member."""
        most = _LENGTH.size + 8 * self._most_chunks
        told = yield from read_frame(self._transfer, Kind.PROTECT, peer, _LENGTH.size, most)
        (length,) = _LENGTH.unpack_from(told)
        self._check_room(peer, length)
        self._lengths[peer] = length
        self._digests[peer] = _digests(told[_LENGTH.size :], -(-length // CHUNK_BYTES), peer)

    def begin(self) -> None:
        """Know what will come, once everybody was heard."""
        self._rows = Rows(self._mine.code, self._in_order(self._lengths))
        kept = self._rows.number // self._mine.code.parts * self._mine.code.parity
        self._parity_digests[self._mine.rank] = np.zeros(kept, np.uint64)
        contributions = ((self._rows.size > 0) & ~self._rows.keeps_parity).sum(axis=1)
        self._waiting = contributions.tolist()

    def give(self, peer: int) -> Outgoing:
        """Send the chunks of which ``peer`` keeps parity."""
        for row in self._rows_kept_by(peer, self._mine.rank):
            slot = int(self._rows.slot[row, self._mine.rank])
            yield from chunk(self._transfer, row, self._data.chunk(slot))

    def take(self, peer: int) -> Incoming:
        """Add the chunks of ``peer`` to one's parity."""
        for row in self._rows_kept_by(self._mine.rank, peer):
            header = yield from read_header(self._transfer, Kind.CHUNK, peer)
            size = int(self._rows.size[row, peer])
            if (header.row, header.length) != (row, size):
                raise SnapshotsDiffer(
                    f"member {peer} sent {header.length:,} bytes of row {header.row}; expected were {size:,} of {row}.",
                    (peer,),
                )
            parity, coefficient = self._parity_of(row), self._coefficient(row, peer)
            digest, position = xxhash.xxh3_64(), 0
            while position < size:
                count = yield self._scratch[: min(size - position, PIECE_BYTES)]
                piece = self._scratch[:count]
                digest.update(piece)
                self._engine.add((coefficient,), np.frombuffer(piece, np.uint8), (parity[position : position + count],))
                position += count
            slot = int(self._rows.slot[row, peer])
            if digest.intdigest() != int(self._digests[peer][slot]):
                raise ChunkCorrupt(
                    f"chunk {slot} of member {peer} has another digest than it announced: it changed after it was "
                    "sealed, or on the way.",
                    (peer,),
                )
            self._count(row)

    def tell(self) -> Outgoing:
        """Acknowledge, with the digests of one's parity."""
        return frame(self._transfer, Kind.DONE, _as_bytes(self._parity_digests[self._mine.rank]))

    def told(self, peer: int) -> Incoming:
        """Receive the acknowledgement of another member."""
        number = self._parity_digests[self._mine.rank].size
        told = yield from read_frame(self._transfer, Kind.DONE, peer, 8 * number, 8 * number)
        self._parity_digests[peer] = _digests(told, number, peer)

    def record(self, pieces: tuple[Pieces, ...]) -> StripeRecord:
        """What is protected, once everybody has acknowledged; ``pieces`` by member, as all have agreed."""
        return StripeRecord(
            self._mine.code,
            self._transfer.step,
            self._mine.generation,
            self._in_order(self._lengths),
            self._in_order(self._digests),
            self._in_order(self._parity_digests),
            pieces,
        )

    def _count(self, row: int) -> None:
        self._waiting[row] -= 1
        if self._waiting[row] == 0:
            longest = int(self._rows.size[row, self._mine.rank])
            slot = int(self._rows.slot[row, self._mine.rank])
            block = self._parity[slot * CHUNK_BYTES :][:longest]
            self._parity_digests[self._mine.rank][slot] = xxhash.xxh3_64_intdigest(block.data)

    def _parity_of(self, row: int) -> ByteArray:
        """One's parity of a row; zeros where nothing was added yet."""
        slot = int(self._rows.slot[row, self._mine.rank])
        block = self._parity[slot * CHUNK_BYTES : (slot + 1) * CHUNK_BYTES]
        if row not in self._begun:
            self._begun.add(row)
            block.fill(0)
        return block

    def _coefficient(self, row: int, peer: int) -> int:
        part = self._rows.part[row]
        return self._mine.code.rows[part[self._mine.rank] - self._mine.code.data][part[peer]]

    def _rows_kept_by(self, keeper: int, giver: int) -> list[int]:
        """Rows in which one member keeps parity and another has data."""
        has_data = (self._rows.size[:, giver] > 0) & ~self._rows.keeps_parity[:, giver]
        found: list[int] = np.flatnonzero(has_data & self._rows.keeps_parity[:, keeper]).tolist()
        return found

    def _check_room(self, member: int, length: int) -> None:
        if -(-length // CHUNK_BYTES) > self._most_chunks:
            needed = parity_bytes(self._mine.code, length)
            raise TransferFailed(
                f"member {member} has {length:,} bytes, whose parity takes {needed:,} bytes on every member; there is room "
                f"for {self._parity.nbytes:,}. Enlarge the room for parity.",
                (member,),
            )

    def _in_order(self, by_member: dict[int, T]) -> tuple[T, ...]:
        return tuple(by_member[member] for member in range(self._mine.code.parts))


def _as_bytes(digests: Digests) -> bytes:
    return digests.astype("<u8").tobytes()


def _digests(text: bytearray, number: int, peer: int) -> Digests:
    if len(text) != 8 * number:
        raise TransferFailed(f"member {peer} sent {len(text)} bytes of digests instead of {8 * number}.", (peer,))
    return np.frombuffer(text, "<u8").astype(np.uint64)
