"""What multiplies bytes by elements of the field and adds them up: the protocol, and the engine that is always
there."""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from evermesh.fault.snapshot.coding.field import Matrix

ByteArray: TypeAlias = npt.NDArray[np.uint8]

_BLOCK_BYTES = 1 << 17
"""Three of these stay in the second-level cache, and the interpreter is called seldom enough."""
_REDUCTION = np.int8(0x1D)
"""What the polynomial puts in place of the bit that a doubling shifts out."""
_SIGN_BIT = np.int8(7)


class Engine(Protocol):
    """All arrays of a call are contiguous and equally long; no output shares memory with another array."""

    name: str

    def combine(self, rows: Matrix, sources: Sequence[ByteArray], outputs: Sequence[ByteArray]) -> None:
        """Set ``outputs[i]`` to the sum of ``rows[i][j] * sources[j]``; there is at least one source."""

    def add(self, column: Sequence[int], source: ByteArray, outputs: Sequence[ByteArray]) -> None:
        """Add ``column[i] * source`` to ``outputs[i]``."""


class NumpyEngine:
    """Every product is a number of doublings, and every sum goes by bits of the coefficients, the highest first.

    The sum of ``c_j d_j`` is ((T_7 2 + T_6) 2 + ...) 2 + T_0 where T_b is the exclusive or of all d_j whose coefficient
    has bit b: Q of k data parts takes k - 1 doublings and k additions. Works in blocks that stay in the cache; releases
    the GIL.
    """

    name = "numpy"

    def combine(self, rows: Matrix, sources: Sequence[ByteArray], outputs: Sequence[ByteArray]) -> None:
        """See :class:`Engine`."""
        terms = [_terms_by_bit(row) for row in rows]
        scratch = np.empty(_BLOCK_BYTES, np.int8)
        for start in range(0, outputs[0].nbytes, _BLOCK_BYTES):
            blocks = [source[start : start + _BLOCK_BYTES] for source in sources]
            for by_bit, output in zip(terms, outputs, strict=True):
                _sum_by_bits(by_bit, blocks, output[start : start + _BLOCK_BYTES], scratch)

    def add(self, column: Sequence[int], source: ByteArray, outputs: Sequence[ByteArray]) -> None:
        """See :class:`Engine`."""
        if all(coefficient <= 1 for coefficient in column):
            add_ones(column, source, outputs)
            return
        scratch, doubled = np.empty(_BLOCK_BYTES, np.int8), np.empty(_BLOCK_BYTES, np.uint8)
        for start in range(0, source.nbytes, _BLOCK_BYTES):
            block = source[start : start + _BLOCK_BYTES]
            term = doubled[: block.nbytes]
            np.copyto(term, block)
            for bit in range(max(column).bit_length()):
                if bit:
                    _double(term, scratch)
                for coefficient, output in zip(column, outputs, strict=True):
                    if coefficient >> bit & 1:
                        part = output[start : start + _BLOCK_BYTES]
                        np.bitwise_xor(part, term, out=part)


def add_ones(column: Sequence[int], source: ByteArray, outputs: Sequence[ByteArray]) -> None:
    """Add ``source`` to the outputs whose coefficient is 1, where all are 0 or 1."""
    for coefficient, output in zip(column, outputs, strict=True):
        if coefficient:
            np.bitwise_xor(output, source, out=output)


def _terms_by_bit(row: Sequence[int]) -> list[list[int]]:
    """For every bit, the highest that occurs first, the sources whose coefficient has it."""
    highest = max(row).bit_length()
    return [[at for at, coefficient in enumerate(row) if coefficient >> bit & 1] for bit in reversed(range(highest))]


def _sum_by_bits(
    by_bit: list[list[int]], blocks: Sequence[ByteArray], output: ByteArray, scratch: npt.NDArray[np.int8]
) -> None:
    if not by_bit:
        output.fill(0)
        return
    first, *others = by_bit[0]
    if others:
        np.bitwise_xor(blocks[first], blocks[others[0]], out=output)
    else:
        np.copyto(output, blocks[first])
    _add_all(output, blocks, others[1:])
    for terms in by_bit[1:]:
        _double(output, scratch)
        _add_all(output, blocks, terms)


def _add_all(output: ByteArray, blocks: Sequence[ByteArray], terms: Sequence[int]) -> None:
    for term in terms:
        np.bitwise_xor(output, blocks[term], out=output)


def _double(block: ByteArray, scratch: npt.NDArray[np.int8]) -> None:
    """Multiply every byte of a block by 2."""
    signed, carried = block.view(np.int8), scratch[: block.nbytes]
    np.right_shift(signed, _SIGN_BIT, out=carried)  # all bits of a byte whose highest one is set
    np.bitwise_and(carried, _REDUCTION, out=carried)
    np.add(signed, signed, out=signed)
    np.bitwise_xor(signed, carried, out=signed)
