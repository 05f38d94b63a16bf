"""Reading parts of a checksummed file: every chunk that is touched is read once and verified."""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from evermesh.checkpoint.errors import CheckpointCorrupt
from evermesh.checkpoint.files import CHUNK_BYTES, ByteArray
from evermesh.checkpoint.format import Manifest
from evermesh.checkpoint.regions import IntArray

_SHORT_RUN_BYTES = 256


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


class ChunkReader:
    """Reads chunks of one file of a checkpoint and verifies them. A context manager.

    Raises:
        CheckpointCorrupt: at the start when the file is missing or of another size, later when a chunk is wrong.
    """

    def __init__(self, path: Path, manifest: Manifest, name: str) -> None:
        self.path, self.bytes_read = path / name, 0
        self._manifest, self._name, self._file = manifest, name, manifest.files[name]
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise CheckpointCorrupt(self.path, "the file is missing") from error
        num_bytes = os.fstat(self._descriptor).st_size
        if num_bytes != self._file.num_bytes:
            os.close(self._descriptor)
            raise CheckpointCorrupt(self.path, f"it has {num_bytes:,} bytes, {self._file.num_bytes:,} were saved")

    def __enter__(self) -> "ChunkReader":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def size(self, chunk: int) -> int:
        """Bytes of a chunk."""
        return min(CHUNK_BYTES, self._file.num_bytes - chunk * CHUNK_BYTES)

    def read(self, chunk: int, buffer: ByteArray) -> None:
        """Fill ``buffer``, which has the size of the chunk, and verify it."""
        view, begin, filled = buffer.data, chunk * CHUNK_BYTES, 0
        while filled < view.nbytes:
            num_bytes = os.preadv(self._descriptor, [view[filled:]], begin + filled)
            if not num_bytes:
                raise CheckpointCorrupt(self.path, f"it ends at byte {begin + filled:,}")
            filled += num_bytes
        self.bytes_read += filled
        if xxhash.xxh3_64_hexdigest(view) != self._file.checksum(chunk):
            tensors = self._manifest.tensors_in(self._name, begin, begin + filled)
            raise CheckpointCorrupt(
                self.path, "the checksum is wrong", chunk=chunk, start=begin, stop=begin + filled, tensors=tensors
            )


def read_runs(reader: ChunkReader, runs: Sequence[FileRuns]) -> None:
    """Fill all destinations. A chunk that one run covers is read in place, others go through a buffer of one chunk."""
    by_chunk = sorted(itertools.chain.from_iterable(_by_chunk(r) for r in runs), key=lambda piece: piece[0])
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
