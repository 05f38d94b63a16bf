"""What a protected snapshot of a stripe is made of: every member keeps the same record beside its data and its parity.

Serialised little-endian: magic (8 bytes), data and parity parts (2 each), step and generation (8 each); of every member
in turn the bytes of its data and the number of its parity chunks (8 each); the digests of all data chunks and parity
chunks, member by member (8 each); last the xxh3-64 of all that.
"""

import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash

from evermesh.fault.snapshot.coding import Code, CodeImpossible
from evermesh.fault.snapshot.stripes.errors import RecordUnreadable
from evermesh.fault.snapshot.stripes.payload import Digests
from evermesh.fault.snapshot.stripes.rotation import CHUNK_BYTES, Rows

_MAGIC = b"EVSTRIP1"
_HEAD = struct.Struct("<8sHHQQ")
_MEMBER = struct.Struct("<QQ")
_ROOT = struct.Struct("<Q")


@dataclass(frozen=True, eq=False)
class StripeRecord:
    """One protected snapshot."""

    code: Code
    step: int
    generation: int
    """Of those who protected it."""
    lengths: tuple[int, ...]
    """Bytes of data, by member."""
    data_digests: tuple[Digests, ...]
    parity_digests: tuple[Digests, ...]
    """Of the whole parity chunks, as far as their rows are long, by member."""

    @cached_property
    def rows(self) -> Rows:
        """Of the stripe."""
        return Rows(self.code, self.lengths)

    @cached_property
    def root(self) -> int:
        """Digest of the record."""
        return int(_ROOT.unpack(self.to_bytes()[-_ROOT.size :])[0])

    def digest(self, row: int, member: int) -> int:
        """Of what ``member`` has in ``row``, which is not empty."""
        digests = self.parity_digests if self.rows.keeps_parity[row, member] else self.data_digests
        return int(digests[member][self.rows.slot[row, member]])

    def to_bytes(self) -> bytes:
        """Serialise; :meth:`from_bytes` reads it back."""
        head = _HEAD.pack(_MAGIC, self.code.data, self.code.parity, self.step, self.generation)
        sizes = [
            _MEMBER.pack(length, parity.size) for length, parity in zip(self.lengths, self.parity_digests, strict=True)
        ]
        tables = [table.astype("<u8").tobytes() for table in (*self.data_digests, *self.parity_digests)]
        body = b"".join((head, *sizes, *tables))
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
        counts = [*(-(-length // CHUNK_BYTES) for length, _ in sizes), *(number for _, number in sizes)]
        position = _HEAD.size + code.parts * _MEMBER.size
        if position + 8 * sum(counts) + _ROOT.size != len(text):
            raise ValueError(f"{len(text)} bytes for {sum(counts)} digests")
        tables = []
        for count in counts:
            tables.append(np.frombuffer(text, "<u8", count, position).astype(np.uint64))
            position += 8 * count
        lengths = tuple(length for length, _ in sizes)
        return cls(code, step, generation, lengths, tuple(tables[: code.parts]), tuple(tables[code.parts :]))
