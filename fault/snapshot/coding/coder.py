"""Encoding and decoding of buffers of any lengths, a chunk at a time."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from evermesh.fault.snapshot.coding.choice import choose_engine
from evermesh.fault.snapshot.coding.code import Code
from evermesh.fault.snapshot.coding.engine import ByteArray, Engine
from evermesh.fault.snapshot.coding.errors import TooManyErasures
from evermesh.fault.snapshot.coding.field import Matrix

Buffer: TypeAlias = memoryview | bytes | bytearray | ByteArray

CHUNK_BYTES = 1 << 20
"""Encoded at a time: sources and outputs of it stay in the last-level cache."""
_STAGGER_BYTES = 5 * 4096 + 3 * 64
"""An odd number of pages and some cache lines."""
_LINE_BYTES = 64


class Coder:
    """A code and the engine that computes it.

    Buffers are contiguous. Those of one call may differ in length: a shorter one counts as continued with zeros, and of
    an output only as many bytes are computed as it has.
    """

    def __init__(self, code: Code, engine: Engine | None = None) -> None:
        self.code, self.engine = code, engine or choose_engine().engine

    def encode(self, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
        """Set all parity parts, given all data parts."""
        assert (len(data), len(parity)) == (self.code.data, self.code.parity), "one buffer for every part of the code"
        self._combine(self.code.rows, [_array(part) for part in data], [_array(part) for part in parity])

    def update(self, index: int, start: int, block: Buffer, parity: Sequence[Buffer]) -> None:
        """Add the bytes of data part ``index`` from ``start`` on to all parity parts, which begin as zeros.

        Blocks may come in any order; when each has come once, the parity is that of :meth:`encode`.
        """
        source = _array(block)
        outputs = [_array(part)[start : start + source.nbytes] for part in parity]
        column = [row[index] for row in self.code.rows]
        for begin, stop in _segments([part.nbytes for part in outputs]):
            reached = [at for at, part in enumerate(outputs) if part.nbytes >= stop]
            parts = [outputs[at][begin:stop] for at in reached]
            self.engine.add([column[at] for at in reached], source[begin:stop], parts)

    def decode(self, parts: Mapping[int, Buffer], wanted: Mapping[int, Buffer]) -> None:
        """Compute the parts ``wanted``, by number, out of at least as many other ``parts`` as the code has data parts.

        Raises:
            TooManyErasures: there are fewer.
        """
        if len(parts) < self.code.data:
            raise TooManyErasures(f"code {self.code}", self.code.parts - len(parts), self.code.parity)
        sources = sorted(parts)[: self.code.data]  # data before parity: where all is known, nothing is multiplied
        rows = self.code.solve(list(wanted), sources)
        self._combine(rows, [_array(parts[part]) for part in sources], [_array(part) for part in wanted.values()])

    def _combine(self, rows: Matrix, sources: Sequence[ByteArray], outputs: Sequence[ByteArray]) -> None:
        for begin, stop in _segments([part.nbytes for part in (*sources, *outputs)]):
            given = [at for at, part in enumerate(sources) if part.nbytes >= stop]
            asked = [at for at, part in enumerate(outputs) if part.nbytes >= stop]
            made = [outputs[at][begin:stop] for at in asked]
            if given and made:
                submatrix = tuple(tuple(rows[at][column] for column in given) for at in asked)
                self.engine.combine(submatrix, [sources[at][begin:stop] for at in given], made)
            for part in () if given else made:
                part.fill(0)


def staggered_buffers(number: int, num_bytes: int) -> list[memoryview]:
    """Zeroed buffers that start on cache lines, no two of them a power of two apart.

    Parts whose addresses agree in the lowest 12 bits evict each other from the first-level cache while they are
    encoded, which costs up to four fifths of the speed.
    """
    stride = -(-num_bytes // _LINE_BYTES) * _LINE_BYTES + _STAGGER_BYTES
    block = np.zeros(number * stride + _LINE_BYTES, np.uint8)
    first = -block.ctypes.data % _LINE_BYTES
    return [block[first + at * stride :][:num_bytes].data for at in range(number)]


def _array(buffer: Buffer) -> ByteArray:
    return np.frombuffer(buffer, np.uint8)


def _segments(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Stretches of at most a chunk that every buffer covers either whole or not at all."""
    for start, end in pairwise(sorted({0, *lengths})):
        for begin in range(start, end, CHUNK_BYTES):
            yield begin, min(begin + CHUNK_BYTES, end)
