"""Bytes that lie in several buffers, and the digests of their chunks."""

from collections.abc import Iterator, Sequence
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
        self.nbytes = sum(view.nbytes for view in self.views)

    def part(self, start: int, stop: int) -> Self:
        """Bytes [start, stop), as far as there are some; nothing is copied."""
        found, begin = [], 0
        for view in self.views:
            first, last = max(start - begin, 0), min(stop - begin, view.nbytes)
            if first < last:
                found.append(view[first:last])
            begin += view.nbytes
            if begin >= stop:
                break
        return type(self)(found)

    def chunk(self, slot: int, length: int = CHUNK_BYTES) -> Self:
        """The first ``length`` bytes of a chunk."""
        return self.part(slot * CHUNK_BYTES, slot * CHUNK_BYTES + length)

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """Where each buffer begins, and the buffer."""
        begin = 0
        for view in self.views:
            yield begin, view
            begin += view.nbytes

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
