"""Fetching ranges of an object before they are asked for, several at a time."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future

BLOCK_BYTES = 8 << 20
"""Most that one request fetches: long enough that the wait for its first byte is small beside it."""
_MOST_BLOCKS = 4
"""Of one file, fetched or on the way."""


class ReadAhead:
    """Blocks of one object in the order in which they are wanted; at most ``_MOST_BLOCKS`` are in memory."""

    def __init__(self, pool: Executor, fetch: Callable[[int, int], bytes], ranges: Sequence[tuple[int, int]]) -> None:
        self._pool, self._fetch = pool, fetch
        self._waiting = deque(blocks(ranges))
        self._begun: deque[tuple[int, int, Future[bytes]]] = deque()

    def piece(self, position: int) -> memoryview | None:
        """The bytes from ``position``, which never goes back, to the end of its block; None if it is in none."""
        while self._begun and self._begun[0][1] <= position:
            self._begun.popleft()
        while self._waiting and self._waiting[0][1] <= position:
            self._waiting.popleft()
        while self._waiting and len(self._begun) < _MOST_BLOCKS:
            start, stop = self._waiting.popleft()
            self._begun.append((start, stop, self._pool.submit(self._fetch, start, stop)))
        if not self._begun or position < self._begun[0][0]:
            return None
        start, _, found = self._begun[0]
        return memoryview(found.result())[position - start :]

    def close(self) -> None:
        """Give up what has not begun."""
        for _, _, found in self._begun:
            found.cancel()
        self._waiting.clear()
        self._begun.clear()


def blocks(ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What is fetched together: ranges that follow each other without a gap, at most ``BLOCK_BYTES``; ascending."""
    begin = end = 0
    for start, stop in ranges:
        if start != end:
            yield from _cut(begin, end)
            begin = start
        end = stop
    yield from _cut(begin, end)


def _cut(begin: int, end: int) -> Iterator[tuple[int, int]]:
    for start in range(begin, end, BLOCK_BYTES):
        yield start, min(start + BLOCK_BYTES, end)
