"""Loading on a node: a chunk that several of its ranks want is read and verified by one of them, into memory they share.

Alone, each of them would fetch it again, from the page cache or an object store, and verify it. Chunks are dealt out in
the order of the files, a stretch to each rank, so a node reads as many streams as it has ranks. In rounds every rank reads
the next chunks ahead, in a thread of its own, while it takes what it wants of those that all have read.
"""

import itertools
import logging
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from evermesh.checkpoint.agreement import RankFailure, together
from evermesh.checkpoint.errors import CheckpointCorrupt
from evermesh.checkpoint.files import CHUNK_BYTES, ByteArray
from evermesh.checkpoint.filling import Target, fillings
from evermesh.checkpoint.node_memory import NodeMemory, shared_memory
from evermesh.checkpoint.reading import ChunkReader, read_files, read_pieces
from evermesh.checkpoint.regions import IntArray, StoredForm
from evermesh.checkpoint.scattering import FileRuns, Piece, by_chunk
from evermesh.checkpoint.sources import Found, Source
from evermesh.checkpoint.stores.places import ObjectPath
from evermesh.parallelism.collectives import Communicator

_NODE_CHUNKS = 20
"""That the ranks of a node read together in a round, and at least ``_LEAST_CHUNKS`` each."""
_LEAST_CHUNKS = 2
_ROUNDS_IN_MEMORY = 3
"""One is taken from, one is there or nearly so, one is being read."""
_LEAST_SHARED_BYTES = 64 << 20
"""That ranks of a node would read again; below it they are faster alone."""
_LEAST_RANKS = 4
"""Of a node, to share what lies in a file system: fewer ranks fetch and verify what is in the page cache again in less time
than they need to wait for each other."""
_CALL_SITE = "checkpoint"
_log = logging.getLogger(__name__)


def fill_on_node(
    source: Source,
    found: Mapping[str, Found],
    targets: Mapping[str, Sequence[Target]],
    forms: Mapping[str, StoredForm],
    communicator: Communicator,
) -> int:
    """As ``fill``, for a source of ours, together with the other ranks; returns the bytes that this one has read. Collective.

    Extra memory is 60 MiB on a node of up to ten ranks, 6 MiB for each rank of a larger one. Each rank reads alone where
    they want little that is the same, or cannot share memory.

    Raises:
        CheckpointCorrupt: on every rank, if any found that the checkpoint is not as it was saved.
    """
    try:
        (filling,) = together(communicator, lambda: list(fillings(source, found, targets, forms)))
        runs = filling.runs()
        deal = _Deal.of(source, runs, communicator)
        bytes_read = together(communicator, lambda: read_files(source, runs) if deal is None else deal.read_private())
        if deal is not None:
            bytes_read += deal.read_shared(communicator)
    except RankFailure as failure:
        raise refusal(source, failure) from failure
    filling.finish()
    return bytes_read


def refusal(source: Source, failure: RankFailure) -> Exception:
    """What a rank raises because one could not read; the one that could not raises its own error."""
    if isinstance(failure.__cause__, Exception):
        return failure.__cause__
    return CheckpointCorrupt(source.path, f"rank {failure.rank} could not read its part: {failure.cause}")


class _Chunks:
    """The chunks of all files of a checkpoint of ours, numbered in the order of the files."""

    def __init__(self, source: Source) -> None:
        assert source.sizes is not None, "a checkpoint of ours"
        sizes = source.sizes()
        self.files = sorted(sizes)
        self._bases = [0]
        for name in self.files:
            self._bases.append(self._bases[-1] - (-sizes[name] // CHUNK_BYTES))

    @property
    def total(self) -> int:
        return self._bases[-1]

    def number(self, file: str, chunk: int) -> int:
        return self._bases[self.files.index(file)] + chunk

    def place(self, number: int) -> tuple[str, int]:
        """The file of a chunk, and which of its chunks it is."""
        at = bisect_right(self._bases, number) - 1
        return self.files[at], number - self._bases[at]


class _Deal:
    """Which chunks the ranks of this node read for each other, and the part of this rank."""

    def __init__(
        self, source: Source, chunks: _Chunks, own: Mapping[int, list[Piece]], memory: NodeMemory, shared: IntArray
    ) -> None:
        self._source, self._chunks, self._place, size = source, chunks, memory.place, memory.size
        edges = [len(shared) * place // size for place in range(size + 1)]
        self._stretches = [shared[first:last].tolist() for first, last in itertools.pairwise(edges)]
        self._per_round = _per_round(size)
        self._slots = memory.content[: _slot_bytes(size) * size].reshape(size, _ROUNDS_IN_MEMORY, -1, CHUNK_BYTES)
        self._own = {number: own[number] for number in shared.tolist() if number in own}
        self._private: dict[str, dict[int, list[Piece]]] = {}
        """What no other rank of the node wants, by file and chunk."""
        for number in sorted(own.keys() - self._own.keys()):
            file, chunk = chunks.place(number)
            self._private.setdefault(file, {})[chunk] = own[number]

    @staticmethod
    def of(source: Source, runs: Mapping[str, Sequence[FileRuns]], communicator: Communicator) -> "_Deal | None":
        """None on every rank if none of them is to share. Collective."""
        chunks, ranks = _Chunks(source), Counter(communicator.nodes)
        enough = 2 if isinstance(source.path, ObjectPath) else _LEAST_RANKS
        if max(ranks.values()) < enough or chunks.total * CHUNK_BYTES < _LEAST_SHARED_BYTES:
            return None
        own = {
            chunks.number(file, chunk): pieces
            for file, of_file in runs.items()
            for chunk, pieces in by_chunk(of_file).items()
        }
        size, mask_bytes = ranks[communicator.nodes[communicator.rank]], -(-chunks.total // 8)
        try:
            memory = shared_memory(communicator, _slot_bytes(size) + mask_bytes)
        except RankFailure as failure:
            _log.info("ranks of a node read alone, they share no memory: %s", failure)
            return None
        masks = memory.content[_slot_bytes(size) * size :].reshape(-1)[: mask_bytes * size].reshape(size, mask_bytes)
        is_wanted = np.zeros(chunks.total, bool)
        is_wanted[list(own)] = True
        masks[memory.place] = np.packbits(is_wanted)
        communicator.barrier(_CALL_SITE)
        counts = np.zeros(chunks.total, np.int64)
        for mask in masks:
            counts += np.unpackbits(mask, count=chunks.total)
        shared = np.flatnonzero(counts > 1)
        if int((counts[shared] - 1).sum()) * CHUNK_BYTES < _LEAST_SHARED_BYTES:
            shared = shared[:0]
        return _Deal(source, chunks, own, memory, shared)

    def read_private(self) -> int:
        """Fill what no other rank of the node wants; returns the bytes that were read."""
        return read_pieces(self._source, self._private)

    def read_shared(self, communicator: Communicator) -> int:
        """Fill what this rank wants of the chunks that are shared; returns the bytes that it has read. Collective.

        Raises ``RankFailure`` on every rank, if some rank could not read.
        """
        rounds = torch.tensor([-(-max(map(len, self._stretches)) // self._per_round)])
        communicator.all_reduce(rounds, _CALL_SITE, maximum=True)
        waiting, under_way, bytes_read = iter(range(int(rounds))), deque[Future[int]](), 0
        with ThreadPoolExecutor(1, thread_name_prefix="checkpoint-read") as pool:
            under_way.extend(pool.submit(self._read, at) for at in itertools.islice(waiting, _ROUNDS_IN_MEMORY - 1))
            for current in range(int(rounds)):
                # when all have read it, all have taken the one before, so its memory is free
                bytes_read += together(communicator, under_way.popleft().result)
                under_way.extend(pool.submit(self._read, at) for at in itertools.islice(waiting, 1))
                self._take(current)
        return bytes_read

    def _of_round(self, place: int, current: int) -> list[int]:
        return self._stretches[place][current * self._per_round : (current + 1) * self._per_round]

    def _slot(self, place: int, current: int, at: int) -> ByteArray:
        slot: ByteArray = self._slots[place, current % _ROUNDS_IN_MEMORY, at]
        return slot

    def _read(self, current: int) -> int:
        """This rank's chunks of a round, in the thread that reads."""
        places = [(*self._chunks.place(number), at) for at, number in enumerate(self._of_round(self._place, current))]
        bytes_read = 0
        for file, of_file in itertools.groupby(places, key=lambda place: place[0]):
            entries = [(chunk, at) for _, chunk, at in of_file]
            with ChunkReader(self._source, file) as reader:
                reader.expect([chunk for chunk, _ in entries])
                for chunk, at in entries:
                    reader.read(chunk, self._slot(self._place, current, at)[: reader.size(chunk)])
            bytes_read += reader.bytes_read
        return bytes_read

    def _take(self, current: int) -> None:
        """Copy what this rank wants of a round that all have read."""
        for place in range(len(self._stretches)):
            for at, number in enumerate(self._of_round(place, current)):
                begin = self._chunks.place(number)[1] * CHUNK_BYTES
                for piece in self._own.pop(number, ()):
                    piece.take(self._slot(place, current, at), begin)


def _per_round(size: int) -> int:
    """Chunks that each of ``size`` ranks reads in a round."""
    return max(_LEAST_CHUNKS, _NODE_CHUNKS // size)


def _slot_bytes(size: int) -> int:
    """Memory for the chunks that one of ``size`` ranks reads."""
    return _ROUNDS_IN_MEMORY * _per_round(size) * CHUNK_BYTES
