"""Which member of a stripe holds which part of every row: parity moves on by one member from row to row.

The data of a member is cut into chunks. A *row* takes one chunk of each of ``data`` members, and its parity is kept by
the ``parity`` others; in ``parts`` rows every member has given ``data`` chunks and keeps ``parity`` ones. So everybody
sends its data ``parity`` times, keeps ``parity / data`` of its size, and computes the same share.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from evermesh.fault.snapshot.coding import Code

CHUNK_BYTES = 1 << 20
"""What shares a digest, and is sent at once."""


class Rows:
    """The rows of a stripe with one member for every part of ``code``, whose data have these ``lengths``.

    All arrays are indexed by row and member.
    """

    def __init__(self, code: Code, lengths: Sequence[int]) -> None:
        self.number = num_rows(code, max(lengths))
        rows = np.arange(self.number)
        parts, before = _turns(code)
        self.part = parts[rows % code.parts]
        """Part of the code that a member has: data parts first, then parity."""
        self.keeps_parity = self.part >= code.data
        """Whether a member keeps parity of the row, not data."""
        each = np.where(self.keeps_parity, code.parity, code.data)
        self.slot = (rows // code.parts)[:, None] * each + before[rows % code.parts]
        """Number of the chunk in the data of a member, or among its parity chunks."""
        data = np.clip(np.array(lengths, np.int64) - self.slot * CHUNK_BYTES, 0, CHUNK_BYTES)
        data[self.keeps_parity] = 0
        self.size = np.where(self.keeps_parity, data.max(axis=1, keepdims=True), data)
        """Bytes; parity of a row is as long as its longest data."""


def num_rows(code: Code, longest: int) -> int:
    """Rows that the data of a stripe takes whose longest member has ``longest`` bytes: whole turns."""
    chunks = -(-longest // CHUNK_BYTES)
    return -(-chunks // code.data) * code.parts


def parity_bytes(code: Code, longest: int) -> int:
    """Room for the parity of every member of such a stripe."""
    return num_rows(code, longest) // code.parts * code.parity * CHUNK_BYTES


@lru_cache(maxsize=64)
def _turns(code: Code) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """By row and member of one turn: the part, and how many parts of that kind the member had in earlier rows."""
    members = np.arange(code.parts)
    turn = (members - members[:, None]) % code.parts
    is_parity = turn < code.parity
    seen = np.where(is_parity, np.cumsum(is_parity, axis=0), np.cumsum(~is_parity, axis=0))
    return np.where(is_parity, code.data + turn, turn - code.parity), seen - 1
