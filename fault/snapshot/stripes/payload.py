"""Bytes that lie in several buffers, and the digests of their chunks."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from evermesh.fault.snapshot.stripes.rotation import CHUNK_BYTES

Digests: TypeAlias = npt.NDArray[np.uint64]
"""xxh3-64 of every chunk."""


class Payload:
    """Buffers laid end to end."""

    def __init__(self, views: Sequence[memoryview]) -> None:
        self.views = [view.cast("B") for view in views if view.nbytes]
        *self._begins, self.nbytes = accumulate((view.nbytes for view in self.views), initial=0)

    def part(self, start: int, stop: int) -> Self:
        """Bytes [start, stop), as far as there are some; nothing is copied."""
        found = []
        for at in range(max(bisect_right(self._begins, start) - 1, 0), len(self.views)):
            view, begin = self.views[at], self._begins[at]
            if begin >= stop:
                break
            first, last = max(start - begin, 0), min(stop - begin, view.nbytes)
            if first < last:
                found.append(view[first:last])
        return type(self)(found)

    def without(self, gaps: Iterable[tuple[int, int]]) -> Self:
        """All but the bytes [start, stop) of each of ``gaps``, which are in order and apart; nothing is copied."""
        kept, begin = list[memoryview](), 0
        for start, stop in gaps:
            kept += self.part(begin, start).views
            begin = stop
        return type(self)(kept + self.part(begin, self.nbytes).views)

    def chunk(self, slot: int, length: int = CHUNK_BYTES) -> Self:
        """The first ``length`` bytes of a chunk."""
        return self.part(slot * CHUNK_BYTES, slot * CHUNK_BYTES + length)

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """Where each buffer begins, and the buffer."""
        yield from zip(self._begins, self.views, strict=True)

    def digest(self) -> int:
        """xxh3-64 of all bytes."""
        digest = xxhash.xxh3_64()
        for view in self.views:
            digest.update(view)
        return digest.intdigest()


def digests_of(payload: Payload) -> Digests:
    """Of all chunks of data; the last may be shorter than the others."""
    number = -(-payload.nbytes // CHUNK_BYTES)
    return np.array([payload.chunk(slot).digest() for slot in range(number)], np.uint64)
