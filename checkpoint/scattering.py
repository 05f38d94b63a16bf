"""Copying runs of bytes out of chunks of a file to where they are wanted, in few operations. Imports no torch."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evermesh.checkpoint.files import CHUNK_BYTES, ByteArray
from evermesh.checkpoint.regions import IntArray, Runs

if TYPE_CHECKING:
    import numpy.typing as npt

_SHORT_RUN_BYTES = 256
_MOST_COPIES = 8
"""Short runs that are so many copies or fewer are not gathered element by element."""
_ELEMENTS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, eq=False)
class FileRuns:
    """What one destination takes from a file. Arrays of equal length, in bytes; ``destination`` is contiguous."""

    source: IntArray
    """Positions in the file."""
    offsets: IntArray
    """Positions in the destination."""
    length: IntArray
    destination: ByteArray
    item_bytes: int
    """Bytes of one element: positions, offsets and lengths are multiples of it."""


class Rows(NamedTuple):
    """Stretches of a file that are equally long and equally far apart, there and where they go. Bytes."""

    source: int
    """Position of the first in the file."""
    offset: int
    """Where it goes."""
    size: int
    number: int
    source_step: int
    offset_step: int


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """What one destination takes from a chunk."""

    runs: FileRuns
    rows: tuple[Rows, ...] | None
    """The same as ``runs``, of all chunks; None: short runs without order, which are gathered element by element."""

    def whole(self, size: int) -> "ByteArray | None":
        """Where the chunk goes, of ``size`` bytes, if it goes to one place as it is."""
        if self.rows is None or len(self.rows) != 1 or self.rows[0].size != size:
            return None
        return self.runs.destination[self.rows[0].offset : self.rows[0].offset + size]

    def take(self, buffer: ByteArray, begin: int) -> None:
        """Copy it out of the chunk, which starts at byte ``begin`` of the file."""
        if self.rows is None:
            _gather(buffer, begin, self.runs)
            return
        for rows in self.rows:
            element, there = _ELEMENTS[_item(self.runs, rows)], self.runs.destination
            _rows(there, element, rows.offset, rows.offset_step, rows)[:] = _rows(
                buffer, element, rows.source - begin, rows.source_step, rows
            )


def by_chunk(runs: Iterable[FileRuns]) -> dict[int, list[Piece]]:
    """What destinations take from each chunk of a file, chunks ascending."""
    cut: dict[int, list[Piece]] = {}
    for of_target in runs:
        found = list(progressions(Runs(of_target.source, of_target.offsets, of_target.length)))
        is_short = int(of_target.length.sum()) < _SHORT_RUN_BYTES * len(of_target.length)
        if is_short and len(found) > _MOST_COPIES:
            for chunk, of_chunk in _cut(of_target):
                cut.setdefault(chunk, []).append(Piece(of_chunk, None))
            continue
        rows: dict[int, list[Rows]] = {}
        for first, last in found:
            for chunk, part in _cut_rows(_as_rows(of_target, first, last)):
                rows.setdefault(chunk, []).append(part)
        for chunk, parts in rows.items():
            cut.setdefault(chunk, []).append(Piece(of_target, tuple(parts)))
    return dict(sorted(cut.items()))


def _as_rows(runs: FileRuns, first: int, last: int) -> Rows:
    (source, offset), steps = (int(runs.source[first]), int(runs.offsets[first])), (0, 0)
    if last - first > 1:
        steps = int(runs.source[first + 1]) - source, int(runs.offsets[first + 1]) - offset
    return Rows(source, offset, int(runs.length[first]), last - first, *steps)


def _cut_rows(rows: Rows) -> Iterator[tuple[int, Rows]]:
    """Cut rows at chunk borders, chunks ascending."""
    source, offset, size, count, step, offset_step = rows
    at = 0
    while at < count:
        begin = source + at * step
        chunk = begin // CHUNK_BYTES
        end = (chunk + 1) * CHUNK_BYTES
        inside = min(count - at, (end - size - begin) // step + 1 if step else 1) if begin + size <= end else 0
        if inside:
            yield chunk, Rows(begin, offset + at * offset_step, size, inside, step, offset_step)
            at += inside
            continue
        done = 0  # a row that reaches over the border
        while done < size:
            part = min(size - done, (begin + done) // CHUNK_BYTES * CHUNK_BYTES + CHUNK_BYTES - begin - done)
            there = offset + at * offset_step + done
            yield (begin + done) // CHUNK_BYTES, Rows(begin + done, there, part, 1, 0, 0)
            done += part
        at += 1


def _item(runs: FileRuns, rows: Rows) -> int:
    """Bytes that are copied at a time: elements, unless what others wrote lies anywhere."""
    numbers = rows.source | rows.offset | rows.size | rows.source_step | rows.offset_step
    return 1 if numbers % runs.item_bytes else runs.item_bytes


def _rows(array: ByteArray, element: type[Any], begin: int, step: int, rows: Rows) -> "npt.NDArray[Any]":
    item = np.dtype(element).itemsize
    # refused unless all of it is inside of the array
    return np.ndarray((rows.number, rows.size // item), element, array.data, begin, (step or rows.size, item))


def _gather(buffer: ByteArray, begin: int, runs: FileRuns) -> None:
    source, length = runs.source - begin, runs.length
    item = 1 if int(np.bitwise_or.reduce(source | runs.offsets | length)) % runs.item_bytes else runs.item_bytes
    element = _ELEMENTS[item]
    length = length // item
    within = np.arange(int(length.sum())) - np.repeat(np.cumsum(length) - length, length)
    taken = buffer[: buffer.nbytes // item * item].view(element)[np.repeat(source // item, length) + within]
    runs.destination.view(element)[np.repeat(runs.offsets // item, length) + within] = taken


def progressions(runs: Runs) -> Iterator[tuple[int, int]]:
    """[first, last) of runs that are equally long and equally far apart on both sides; together all runs, in order."""
    if not len(runs.length):
        return
    steps = np.stack([np.diff(runs.source), np.diff(runs.destination)])
    if (steps == steps[:, :1]).all() and (runs.length == runs.length[0]).all() and (steps >= runs.length[0]).all():
        yield 0, len(runs.length)
        return
    is_even = (runs.length[1:] == runs.length[:-1]) & (steps >= runs.length[:-1]).all(axis=0)
    goes_on = is_even[1:] & is_even[:-1] & (steps[:, 1:] == steps[:, :-1]).all(axis=0)
    edges = np.flatnonzero(np.concatenate([[True], ~goes_on, [True]])) if len(is_even) else np.zeros(1, np.int64)
    reached = 0
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):  # steps that are alike
        first = max(begin, reached)
        if is_even[begin] and first < end:
            yield from ((single, single + 1) for single in range(reached, first))
            yield first, end + 1
            reached = end + 1
    yield from ((single, single + 1) for single in range(reached, len(runs.length)))


def _cut(runs: FileRuns) -> Iterator[tuple[int, FileRuns]]:
    """Cut runs at chunk borders; those of one chunk together, chunks ascending."""
    first, last = runs.source // CHUNK_BYTES, (runs.source + runs.length - 1) // CHUNK_BYTES
    counts = last - first + 1
    at = np.repeat(np.arange(len(counts)), counts)
    chunk = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts) + first[at]
    start = np.maximum(runs.source[at], chunk * CHUNK_BYTES)
    stop = np.minimum(runs.source[at] + runs.length[at], (chunk + 1) * CHUNK_BYTES)
    offsets = runs.offsets[at] + start - runs.source[at]
    borders = [0, *(np.flatnonzero(np.diff(chunk)) + 1).tolist(), len(chunk)]
    for low, high in itertools.pairwise(borders):
        if low < high:
            part = slice(low, high)
            cut = FileRuns(start[part], offsets[part], (stop - start)[part], runs.destination, runs.item_bytes)
            yield int(chunk[low]), cut
