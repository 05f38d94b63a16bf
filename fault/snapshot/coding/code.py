"""Codes: from any ``data`` of ``data + parity`` parts all others are computed again.

One parity part is the exclusive or of the data parts. Two are P + Q of RAID-6: P = sum d_j, Q = sum 2^j d_j (H. P.
Anvin, "The mathematics of RAID-6"). Three and more have a Cauchy matrix, parity i of data j has the coefficient 1 /
((data + i) xor j), of which every square part can be inverted (J. Blömer et al., "An XOR-based erasure-resilient coding
scheme", 1995). The bytes are those that ISA-L makes with ``xor_gen``, ``pq_gen`` and ``gf_gen_cauchy1_matrix``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

from evermesh.fault.snapshot.coding.errors import CodeImpossible
from evermesh.fault.snapshot.coding.field import ORDER, Matrix, inverse, inverted, power_of_two, product


@dataclass(frozen=True, slots=True)
class Code:
    """``data`` parts and ``parity`` parts; they are numbered 0 to data - 1, then data to data + parity - 1.

    Raises:
        CodeImpossible: less than one of either, or more parts than the field has elements.
    """

    data: int
    parity: int

    def __post_init__(self) -> None:
        if self.data < 1 or self.parity < 1:
            raise CodeImpossible(
                f"a code of {self.data} data and {self.parity} parity parts protects nothing. Give at least 1 + 1."
            )
        if self.parts > ORDER + 1 - (self.parity == 2):
            raise CodeImpossible(
                f"{self.data} + {self.parity} = {self.parts} parts do not fit into GF(2^8). Give at most {ORDER} in all."
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The code that is written ``6+2``. Raises :class:`CodeImpossible`."""
        found = re.fullmatch(r"(\d{1,3})\+(\d{1,3})", text)
        if not found:
            raise CodeImpossible(f"{text!r} is no code. Give data + parity parts, such as 6+2.")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.data}+{self.parity}"

    @property
    def parts(self) -> int:
        """Data and parity."""
        return self.data + self.parity

    @property
    def overhead(self) -> float:
        """Parity bytes per byte of data."""
        return self.parity / self.data

    @property
    def rows(self) -> Matrix:
        """Coefficient of data part j (column) in parity part i (row)."""
        return _rows(self.data, self.parity)

    def solve(self, wanted: Sequence[int], sources: Sequence[int]) -> Matrix:
        """How the parts ``wanted`` are made of ``data`` other parts: a row of coefficients of ``sources`` for each."""
        assert len(set(sources)) == len(sources) == self.data, "exactly as many different sources as data parts"
        return _solve(self.data, self.parity, tuple(wanted), tuple(sources))


@lru_cache(maxsize=256)
def _rows(data: int, parity: int) -> Matrix:
    if parity == 1:
        return ((1,) * data,)
    if parity == 2:
        return (1,) * data, tuple(power_of_two(column) for column in range(data))
    return tuple(tuple(inverse((data + row) ^ column) for column in range(data)) for row in range(parity))


@lru_cache(maxsize=4096)
def _solve(data: int, parity: int, wanted: tuple[int, ...], sources: tuple[int, ...]) -> Matrix:
    identity = tuple(tuple(int(row == column) for column in range(data)) for row in range(data))
    whole = identity + _rows(data, parity)
    return product(tuple(whole[part] for part in wanted), inverted(tuple(whole[part] for part in sources)))
