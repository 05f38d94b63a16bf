"""Parity: one part more for every ``width`` ranks, from which the files of any one of them can be made again.

The ranks of a stripe stand as far apart as possible, so that those of one node are in different stripes. The files of a rank,
laid end to end with its index behind them, are its *payload*; the parity of a stripe is the exclusive or of the payloads of
its ranks, the shorter ones continued with zeros. It is cut into as many parts as the stripe has ranks, which the ranks of the
next stripe compute and write: everybody reads about as much as it has written.

Only in file systems: object stores keep every object in several places themselves. Needs nothing but the standard library and
xxhash until parity is computed, which takes numpy.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from evermesh.checkpoint.committing import index_name
from evermesh.checkpoint.encoding import IndexHead, index_payload
from evermesh.checkpoint.files import CHUNK_BYTES, write_checksummed, write_durably

_BLOCK_BYTES = 4 << 20


class ParityPart(NamedTuple):
    """Some bytes of the parity of a stripe."""

    stripe: int
    number: int
    start: int
    """First byte of the payloads."""
    stop: int

    @property
    def name(self) -> str:
        """Of its file."""
        return f"parity-{self.stripe:05d}-{self.number:02d}.xor"

    @property
    def index_name(self) -> str:
        """Of the index that has the checksums of its file."""
        return f"parity-{self.stripe:05d}-{self.number:02d}.index"


@dataclass(frozen=True, slots=True)
class Stripes:
    """How ``world_size`` ranks protect each other: at most ``width`` of them in a stripe."""

    world_size: int
    width: int

    @property
    def number(self) -> int:
        """Of stripes."""
        return -(-self.world_size // self.width)

    def of_rank(self, rank: int) -> int:
        """The stripe of a rank."""
        return rank % self.number

    def members(self, stripe: int) -> range:
        """The ranks of a stripe."""
        return range(stripe, self.world_size, self.number)

    def parts(self, stripe: int, payload_bytes: Callable[[int], int]) -> list[ParityPart]:
        """The parts of the parity of a stripe, of whole chunks; ``payload_bytes`` tells how long that of a rank is."""
        members = self.members(stripe)
        longest = max(map(payload_bytes, members))
        each = -(-longest // (len(members) * CHUNK_BYTES)) * CHUNK_BYTES
        edges = [min(number * each, longest) for number in range(len(members) + 1)]
        return [ParityPart(stripe, at, edges[at], edges[at + 1]) for at in range(len(members)) if edges[at] < longest]

    def protected_by(self, rank: int) -> int:
        """The stripe whose parity a rank helps to write: another one than its own, if there are several."""
        return (self.of_rank(rank) - 1) % self.number

    def written_by(self, rank: int, parts: Sequence[ParityPart]) -> list[ParityPart]:
        """Of all ``parts`` of that stripe those that the rank writes."""
        writers = self.members(self.of_rank(rank))
        return [part for part in parts if part.number % len(writers) == writers.index(rank)]


class PayloadFiles:
    """Reads the payload of a rank. A context manager; files are opened when they are first needed.

    Args:
        sizes: of the files, in their order. Raises ``OSError`` where one is missing or shorter.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        self._folder, self._sizes = folder, sizes
        self._open: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), fewer at the end of the payload."""
        found, begin = b"", 0
        for name, size in self._sizes.items():
            first, last = max(start, begin), min(stop, begin + size)
            if first < last:
                found += self._read(name, first - begin, last - first)
            begin += size
        return found

    def _read(self, name: str, position: int, num_bytes: int) -> bytes:
        if name not in self._open:
            self._open[name] = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(self._open[name]).st_size < position + num_bytes:  # before memory is asked for
            raise EOFError(f"{self._folder / name} ends before byte {position + num_bytes:,}")
        found = b""
        while len(found) < num_bytes:
            part = os.pread(self._open[name], num_bytes - len(found), position + len(found))
            if not part:
                raise EOFError(f"{self._folder / name} ends at byte {position + len(found):,}")
            found += part
        return found


def payload_sizes(rank: int, files: Mapping[str, int], index_bytes: int) -> dict[str, int]:
    """Files of the payload of a rank in their order, with their sizes."""
    return {**dict(sorted(files.items())), index_name(rank): index_bytes}


def protect(folder: Path, stripes: Stripes, rank: int, heads: Mapping[int, IndexHead]) -> None:
    """Write the parity that ``rank`` has to write, given at least the heads of the stripe that it protects; durable on
    return. Extra memory is some MiB."""
    stripe = stripes.protected_by(rank)
    payloads = [payload_sizes(at, heads[at].files, heads[at].num_bytes) for at in stripes.members(stripe)]
    for part in stripes.written_by(rank, parts_of(stripes, stripe, heads)):
        num_bytes, checksums = write_checksummed(folder / part.name, parity_blocks(folder, part, payloads))
        payload = index_payload({part.name: (num_bytes, checksums)}, {}, {})
        path = folder / part.index_name
        write_durably(path.with_suffix(".part"), [payload])
        os.rename(path.with_suffix(".part"), path)  # whoever sees it sees all of it


def parts_of(stripes: Stripes, stripe: int, heads: Mapping[int, IndexHead]) -> list[ParityPart]:
    """The parts of the parity of a stripe, given the heads of its ranks."""
    return stripes.parts(stripe, lambda rank: sum(heads[rank].files.values()) + heads[rank].num_bytes)


def parity_blocks(folder: Path, part: ParityPart, payloads: Sequence[Mapping[str, int]]) -> Iterator[memoryview]:
    """The bytes of a part of the parity of ``payloads``, whose files are in ``folder``."""
    readers = [PayloadFiles(folder, sizes) for sizes in payloads]
    try:
        for start in range(part.start, part.stop, _BLOCK_BYTES):
            stop = min(start + _BLOCK_BYTES, part.stop)
            yield exclusive_or(stop - start, (reader.read(start, stop) for reader in readers))
    finally:
        for reader in readers:
            reader.__exit__(None, None, None)


def exclusive_or(num_bytes: int, blocks: Iterator[bytes]) -> memoryview:
    """Of blocks of at most ``num_bytes``; what they lack is zeros."""
    import numpy as np

    total = np.zeros(num_bytes, np.uint8)
    for block in blocks:
        total[: len(block)] ^= np.frombuffer(block, np.uint8)
    return total.data
