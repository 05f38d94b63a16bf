"""Reading parts of the files of a checkpoint: coalesced, and verified where there are checksums."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

import numpy as np
import xxhash

from evermesh.checkpoint.errors import CheckpointCorrupt
from evermesh.checkpoint.files import CHUNK_BYTES, ByteArray
from evermesh.checkpoint.format import StoredFile
from evermesh.checkpoint.regions import IntArray
from evermesh.checkpoint.sources import Source
from evermesh.checkpoint.stores.places import ObjectPath
from evermesh.checkpoint.stores.store import store_of

_SHORT_RUN_BYTES = 256
_FILES_IN_FLIGHT = 4
_MOST_BUFFERS = 1024
"""Of one call (IOV_MAX of Linux)."""


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


class FileReader:
    """Reads bytes of one file of a checkpoint. A context manager.

    Raises:
        CheckpointCorrupt: at the start when the file is missing or of another size than the index says.
    """

    def __init__(self, source: Source, name: str) -> None:
        self.path, self.bytes_read = source.path / name, 0
        self._num_bytes = source.files[name].num_bytes
        try:
            self._open = store_of(self.path).open(self.path)
        except FileNotFoundError as error:
            raise CheckpointCorrupt(self.path, "the file is missing") from error
        if self._open.num_bytes != self._num_bytes:
            self._open.close()
            fact = f"it has {self._open.num_bytes:,} bytes, {self._num_bytes:,} were saved"
            raise CheckpointCorrupt(self.path, fact)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def expect_bytes(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Tell which bytes [start, stop) will be read, ascending."""
        self._open.expect(ranges)

    def read_at(self, position: int, buffers: Sequence[memoryview]) -> None:
        """Fill ``buffers``, at most ``_MOST_BUFFERS``, one after the other with the bytes from ``position`` on."""
        try:
            self.bytes_read += self._open.read_at(position, buffers)
        except EOFError as error:
            raise CheckpointCorrupt(self.path, f"it ends at byte {error.args[0]:,}") from error


class ChunkReader(FileReader):
    """Reads whole chunks of a file and verifies them. What is lost or damaged is made again where there is parity.

    Raises:
        CheckpointCorrupt: when a chunk is wrong, besides what ``FileReader`` raises.
    """

    def __init__(self, source: Source, name: str) -> None:
        self._lost: CheckpointCorrupt | None = None
        try:
            super().__init__(source, name)
        except CheckpointCorrupt as error:
            if source.recovery is None:
                raise
            self._lost = error
        file = source.files[name]
        assert isinstance(file, StoredFile), "a file with checksums"
        self._source, self._name, self._file = source, name, file

    def __exit__(self, *error: object) -> None:
        if self._lost is None:
            super().__exit__(*error)

    @property
    def num_chunks(self) -> int:
        """Chunks of the file; the last one may be short."""
        return self._file.num_chunks

    def size(self, chunk: int) -> int:
        """Bytes of a chunk."""
        return min(CHUNK_BYTES, self._file.num_bytes - chunk * CHUNK_BYTES)

    def expect(self, chunks: Iterable[int]) -> None:
        """Tell which chunks will be read, ascending."""
        if self._lost is None:
            self.expect_bytes([(chunk * CHUNK_BYTES, chunk * CHUNK_BYTES + self.size(chunk)) for chunk in chunks])

    def read(self, chunk: int, buffer: ByteArray) -> None:
        """Fill ``buffer``, which has the size of the chunk, and verify it."""
        begin = chunk * CHUNK_BYTES
        if self._lost is None:
            self.read_at(begin, [buffer.data])
        if self._lost is not None or not self._is_whole(chunk, buffer):
            self._recover(chunk, begin, buffer)

    def _is_whole(self, chunk: int, buffer: ByteArray) -> bool:
        return bool(xxhash.xxh3_64_hexdigest(buffer.data) == self._file.checksum(chunk))

    def _recover(self, chunk: int, begin: int, buffer: ByteArray) -> None:
        recovery, end = self._source.recovery, begin + buffer.nbytes
        again = recovery.bytes_of(self._name, begin, end) if recovery is not None else None
        if recovery is not None and again is not None and len(again) == buffer.nbytes:
            buffer[:] = np.frombuffer(again, np.uint8)
            if self._is_whole(chunk, buffer):
                recovery.tell(self._name)
                return
        if self._lost is not None:
            raise self._lost
        raise CheckpointCorrupt(
            self.path,
            "the checksum is wrong",
            chunk=chunk,
            start=begin,
            stop=end,
            tensors=self._source.tensors_in(self._name, begin, end),
            elements=self._source.elements_in(self._name, begin, end),
        )


def read_files(source: Source, runs: Mapping[str, Sequence[FileRuns]]) -> int:
    """Fill all destinations from the files of ``source``; returns the bytes read from them. From an object store several
    files are read at a time, because every one begins with a wait."""
    names = sorted(runs)
    if not isinstance(source.path, ObjectPath) or len(names) <= 1:
        return sum(read_runs(source, name, runs[name]) for name in names)
    with ThreadPoolExecutor(min(len(names), _FILES_IN_FLIGHT)) as pool:
        return sum(pool.map(lambda name: read_runs(source, name, runs[name]), names))


def read_runs(source: Source, name: str, runs: Sequence[FileRuns]) -> int:
    """Fill all destinations from a file of ``source``; returns the bytes read from it.

    Where the format has checksums, every chunk that is touched is read once and verified: in place if one run covers it,
    else through a buffer of one chunk. Where it has none, exactly the runs are read, straight into the destinations;
    runs that follow each other in the file are one call.
    """
    if isinstance(source.files[name], StoredFile):
        with ChunkReader(source, name) as chunks:
            _read_chunks(chunks, runs)
        return chunks.bytes_read
    with FileReader(source, name) as reader:
        _read_exactly(reader, runs)
    return reader.bytes_read


def _read_exactly(reader: FileReader, runs: Sequence[FileRuns]) -> None:
    position = np.concatenate([r.source for r in runs])
    length = np.concatenate([r.length for r in runs])
    offsets = np.concatenate([r.offsets for r in runs])
    owner = np.repeat(np.arange(len(runs)), [len(r.source) for r in runs])
    order = np.argsort(position, kind="stable")
    position, length, offsets, owner = position[order], length[order], offsets[order], owner[order]
    views = [r.destination.data for r in runs]
    heads = np.flatnonzero(np.concatenate([[True], position[1:] != position[:-1] + length[:-1]]))
    together = list(itertools.pairwise([*heads.tolist(), len(position)]))
    reader.expect_bytes([(int(position[low]), int(position[high - 1] + length[high - 1])) for low, high in together])
    for low, high in together:
        for begin in range(low, high, _MOST_BUFFERS):
            part = slice(begin, min(begin + _MOST_BUFFERS, high))
            places = zip(owner[part].tolist(), offsets[part].tolist(), length[part].tolist(), strict=True)
            reader.read_at(int(position[begin]), [views[of][start : start + size] for of, start, size in places])


def _read_chunks(reader: ChunkReader, runs: Sequence[FileRuns]) -> None:
    by_chunk = sorted(itertools.chain.from_iterable(_by_chunk(r) for r in runs), key=lambda piece: piece[0])
    reader.expect(sorted({chunk for chunk, _ in by_chunk}))
    buffer = np.empty(CHUNK_BYTES, np.uint8)
    for chunk, group in itertools.groupby(by_chunk, key=lambda piece: piece[0]):
        pieces = [piece for _, piece in group]
        size = reader.size(chunk)
        first = pieces[0]
        if len(pieces) == 1 and len(first.length) == 1 and first.length[0] == size:
            offset = int(first.offsets[0])
            reader.read(chunk, first.destination[offset : offset + size])
            continue
        reader.read(chunk, buffer[:size])
        for piece in pieces:
            _scatter(buffer, chunk * CHUNK_BYTES, piece)


def _by_chunk(runs: FileRuns) -> Iterator[tuple[int, FileRuns]]:
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


def _scatter(buffer: ByteArray, begin: int, runs: FileRuns) -> None:
    """Copy runs out of a chunk that starts at byte ``begin`` of the file."""
    source = runs.source - begin
    if len(source) < 8 or int(runs.length.sum()) >= _SHORT_RUN_BYTES * len(source):
        for position, offset, length in zip(source.tolist(), runs.offsets.tolist(), runs.length.tolist(), strict=True):
            runs.destination[offset : offset + length] = buffer[position : position + length]
        return
    items = runs.length // runs.item_bytes
    within = np.arange(int(items.sum())) - np.repeat(np.cumsum(items) - items, items)
    element = np.dtype(f"V{runs.item_bytes}")
    taken = buffer.view(element)[np.repeat(source // runs.item_bytes, items) + within]
    runs.destination.view(element)[np.repeat(runs.offsets // runs.item_bytes, items) + within] = taken
