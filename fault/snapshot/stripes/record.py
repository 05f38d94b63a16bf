"""What a protected snapshot of a stripe is made of: every member keeps the same record beside its data and its parity.

Serialised little-endian: magic (8 bytes), data and parity parts (2 each), step and generation (8 each); of every member
in turn the bytes that it codes, and the numbers of its parity chunks and of its pieces that others hold too (8 each); the
digests of all data chunks and parity chunks, member by member (8 each); these pieces, member by member (``PIECE``, 32
each); last the xxh3-64 of all that.
"""

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash

from evermesh.fault.snapshot.coding import Code, CodeImpossible
from evermesh.fault.snapshot.stripes.copies import PIECE, Pieces, copied_bytes, gaps
from evermesh.fault.snapshot.stripes.errors import RecordUnreadable
from evermesh.fault.snapshot.stripes.payload import Digests, Payload
from evermesh.fault.snapshot.stripes.rotation import CHUNK_BYTES, Rows

_MAGIC = b"EVSTRIP2"
_HEAD = struct.Struct("<8sHHQQ")
_MEMBER = struct.Struct("<QQQ")
_ROOT = struct.Struct("<Q")


@dataclass(frozen=True, eq=False)
class StripeRecord:
    """One protected snapshot."""

    code: Code
    step: int
    generation: int
    """Of those who protected it."""
    lengths: tuple[int, ...]
    """Bytes of data that are coded, by member: all but what only others code, or nobody."""
    data_digests: tuple[Digests, ...]
    """Of the chunks of what is coded, by member."""
    parity_digests: tuple[Digests, ...]
    """Of the whole parity chunks, as far as their rows are long, by member."""
    pieces: tuple[Pieces, ...]
    """What other members hold too, by member."""

    @cached_property
    def rows(self) -> Rows:
        """Of the stripe."""
        return Rows(self.code, self.lengths)

    @cached_property
    def root(self) -> int:
        """Digest of the record."""
        return int(_ROOT.unpack(self.to_bytes()[-_ROOT.size :])[0])

    def data_bytes(self, member: int) -> int:
        """All that a member holds."""
        return self.lengths[member] + copied_bytes(self.pieces[member])

    def coded(self, member: int, data: Payload) -> Payload:
        """What a member codes of its data."""
        return data.without(gaps(self.pieces[member]))

    def digest(self, row: int, member: int) -> int:
        """Of what ``member`` has in ``row``, which is not empty."""
        digests = self.parity_digests if self.rows.keeps_parity[row, member] else self.data_digests
        return int(digests[member][self.rows.slot[row, member]])

    def to_bytes(self) -> bytes:
        """Serialise; :meth:`from_bytes` reads it back."""
        head = _HEAD.pack(_MAGIC, self.code.data, self.code.parity, self.step, self.generation)
        sizes = [
            _MEMBER.pack(length, parity.size, pieces.size)
            for length, parity, pieces in zip(self.lengths, self.parity_digests, self.pieces, strict=True)
        ]
        tables = [table.astype("<u8").tobytes() for table in (*self.data_digests, *self.parity_digests)]
        body = b"".join((head, *sizes, *tables, *(pieces.tobytes() for pieces in self.pieces)))
        return body + _ROOT.pack(xxhash.xxh3_64_intdigest(body))

    @classmethod
    def from_bytes(cls, text: bytes | bytearray | memoryview) -> "StripeRecord":
        """Read a record.

        Raises:
            RecordUnreadable: it is damaged, or none.
        """
        text = bytes(text)
        if len(text) < _HEAD.size + _ROOT.size or text[: len(_MAGIC)] != _MAGIC:
            raise RecordUnreadable(f"{len(text)} bytes are no record of a protected snapshot.")
        if _ROOT.unpack(text[-_ROOT.size :])[0] != xxhash.xxh3_64_intdigest(text[: -_ROOT.size]):
            raise RecordUnreadable("the record of a protected snapshot is damaged: its digest is another one.")
        try:
            return cls._parse(text)
        except (struct.error, ValueError, CodeImpossible) as error:
            raise RecordUnreadable(f"the record of a protected snapshot is inconsistent: {error}") from error

    @classmethod
    def _parse(cls, text: bytes) -> "StripeRecord":
        _, data, parity, step, generation = _HEAD.unpack_from(text)
        code = Code(data, parity)
        sizes = [_MEMBER.unpack_from(text, _HEAD.size + at * _MEMBER.size) for at in range(code.parts)]
        kinds = [
            *((np.dtype("<u8"), -(-length // CHUNK_BYTES)) for length, _, _ in sizes),
            *((np.dtype("<u8"), number) for _, number, _ in sizes),
            *((PIECE, number) for _, _, number in sizes),
        ]
        position = _HEAD.size + code.parts * _MEMBER.size
        if position + sum(kind.itemsize * count for kind, count in kinds) + _ROOT.size != len(text):
            raise ValueError(f"{len(text)} bytes for {sum(count for _, count in kinds)} digests and pieces")
        tables = []
        for kind, count in kinds:
            tables.append(np.frombuffer(text, kind, count, position).copy())
            position += kind.itemsize * count
        data_digests, parity_digests, pieces = (
            tuple(tables[at * code.parts : (at + 1) * code.parts]) for at in range(3)
        )
        lengths = tuple(length for length, _, _ in sizes)
        return cls(code, step, generation, lengths, data_digests, parity_digests, pieces)
