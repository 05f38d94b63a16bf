"""Arithmetic in GF(2^8) modulo x^8 + x^4 + x^3 + x^2 + 1 (0x11d), whose element 2 generates all others.

The field of RAID-6 and of ISA-L. Elements are integers from 0 to 255, addition is exclusive or. Here are single
elements and matrices of a code (at most 255 wide); bytes in bulk are the work of an engine.
"""

from collections.abc import Sequence
from typing import TypeAlias

POLYNOMIAL = 0x11D
ORDER = 255
"""Of the element 2."""

Matrix: TypeAlias = tuple[tuple[int, ...], ...]
"""Rows of elements."""


def _powers_of_two() -> tuple[int, ...]:
    powers, element = [], 1
    for _ in range(ORDER):
        powers.append(element)
        element <<= 1
        if element > ORDER:
            element ^= POLYNOMIAL
    return tuple(powers)


_POWERS = _powers_of_two()
_LOGARITHMS = {element: exponent for exponent, element in enumerate(_POWERS)}


def power_of_two(exponent: int) -> int:
    """2 multiplied by itself; the exponent counts modulo 255."""
    return _POWERS[exponent % ORDER]


def multiply(first: int, second: int) -> int:
    """Product of two elements."""
    if first == 0 or second == 0:
        return 0
    return power_of_two(_LOGARITHMS[first] + _LOGARITHMS[second])


def inverse(element: int) -> int:
    """The element whose product with ``element`` is 1. Raises ``ZeroDivisionError`` for 0."""
    if element == 0:
        raise ZeroDivisionError("0 has no inverse in GF(2^8)")
    return power_of_two(-_LOGARITHMS[element])


def product(first: Matrix, second: Matrix) -> Matrix:
    """Product of two matrices."""
    columns = list(zip(*second, strict=True))
    return tuple(tuple(_dot(row, column) for column in columns) for row in first)


def inverted(matrix: Matrix) -> Matrix:
    """Inverse of a square matrix, by Gauss and Jordan. Raises ``ZeroDivisionError`` where there is none."""
    size = len(matrix)
    rows = [[*row, *(int(index == at) for at in range(size))] for index, row in enumerate(matrix)]
    for column in range(size):
        pivot = next((row for row in range(column, size) if rows[row][column]), None)
        if pivot is None:
            raise ZeroDivisionError(f"a matrix of {size} rows has rank {column} at most in its first columns")
        rows[column], rows[pivot] = rows[pivot], rows[column]
        scale = inverse(rows[column][column])
        rows[column] = [multiply(scale, element) for element in rows[column]]
        for other in range(size):
            factor = rows[other][column]
            if other != column and factor:
                rows[other] = [a ^ multiply(factor, b) for a, b in zip(rows[other], rows[column], strict=True)]
    return tuple(tuple(row[size:]) for row in rows)


def _dot(row: Sequence[int], column: Sequence[int]) -> int:
    total = 0
    for a, b in zip(row, column, strict=True):
        total ^= multiply(a, b)
    return total
