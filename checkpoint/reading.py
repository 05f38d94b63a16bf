"""Reading parts of the files of a checkpoint: coalesced, and verified where there are checksums."""

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
import xxhash

from evermesh.checkpoint.errors import CheckpointCorrupt
from evermesh.checkpoint.files import CHUNK_BYTES, ByteArray
from evermesh.checkpoint.format import StoredFile
from evermesh.checkpoint.scattering import FileRuns, Piece, by_chunk
from evermesh.checkpoint.sources import Source
from evermesh.checkpoint.stores.places import ObjectPath

_FILES_IN_FLIGHT = 4
_STRETCHES = 4
"""That are read in turns. One in an object store: what will be wanted is asked for there, several blocks at a time."""
_MOST_BUFFERS = 1024
"""Of one call (IOV_MAX of Linux)."""


class FileReader:
    """Reads bytes of one file of a checkpoint. A context manager.

    Raises:
        CheckpointCorrupt: at the start when the file is missing or of another size than the index says.
    """

    def __init__(self, source: Source, name: str) -> None:
        self.path, self.bytes_read = source.path / name, 0
        self._num_bytes = source.files[name].num_bytes
        try:
            self._open = source.open(name)
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
    if isinstance(source.path, ObjectPath) and len(names) > 1:
        with ThreadPoolExecutor(min(len(names), _FILES_IN_FLIGHT)) as pool:
            return sum(pool.map(lambda name: read_runs(source, name, runs[name]), names))
    if source.is_foreign:
        return sum(read_runs(source, name, runs[name]) for name in names)
    return read_pieces(source, {name: by_chunk(runs[name]) for name in names})


def read_pieces(source: Source, pieces: Mapping[str, Mapping[int, Sequence[Piece]]]) -> int:
    """Fill what is taken from chunks, by file and chunk; returns the bytes read from them.

    Every chunk is read once and verified: in place if it goes to one place as it is, else through a buffer of one chunk.
    Several stretches take turns: the system reads ahead in each of them, so that the disk is never without a request while
    a chunk is verified and copied.
    """
    work = [(file, chunk) for file in sorted(pieces) for chunk in pieces[file]]
    number = 1 if isinstance(source.path, ObjectPath) else _STRETCHES
    edges = [len(work) * at // number for at in range(number + 1)]
    buffer, bytes_read = np.empty(CHUNK_BYTES, np.uint8), 0
    stretches = deque(_stretch(source, pieces, work[a:b], buffer) for a, b in itertools.pairwise(edges) if a < b)
    try:
        while stretches:
            num_bytes = next(stretches[0], None)
            if num_bytes is None:
                stretches.popleft()
                continue
            bytes_read += num_bytes
            stretches.rotate(-1)
    finally:
        for stretch in stretches:
            stretch.close()
    return bytes_read


def _stretch(
    source: Source,
    pieces: Mapping[str, Mapping[int, Sequence[Piece]]],
    work: Sequence[tuple[str, int]],
    buffer: ByteArray,
) -> Generator[int, None, None]:
    """Do ``work``, a chunk at a time; the bytes that each took from its file."""
    for file, of_file in itertools.groupby(work, key=lambda place: place[0]):
        with ChunkReader(source, file) as reader:
            chunks = [chunk for _, chunk in of_file]
            reader.expect(chunks)
            for chunk in chunks:
                before = reader.bytes_read
                _read_chunk(reader, chunk, pieces[file][chunk], buffer)
                yield reader.bytes_read - before


def read_runs(source: Source, name: str, runs: Sequence[FileRuns]) -> int:
    """Fill all destinations from a file of ``source``; returns the bytes read from it.

    Where the format has checksums, as ``read_pieces`` does. Where it has none, exactly the runs are read, straight into the
    destinations; runs that follow each other in the file are one call.
    """
    if isinstance(source.files[name], StoredFile):
        pieces, buffer = {name: by_chunk(runs)}, np.empty(CHUNK_BYTES, np.uint8)
        return sum(_stretch(source, pieces, [(name, chunk) for chunk in pieces[name]], buffer))
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


def _read_chunk(reader: ChunkReader, chunk: int, pieces: Sequence[Piece], buffer: ByteArray) -> None:
    size = reader.size(chunk)
    place = pieces[0].whole(size) if len(pieces) == 1 else None
    reader.read(chunk, buffer[:size] if place is None else place)
    for piece in pieces if place is None else ():
        piece.take(buffer, chunk * CHUNK_BYTES)
