"""What a keeper tells the others of its stripe before they protect a snapshot: what it holds, and which of that they may hold
too, because it is of the same region of a tensor."""

import json
import struct
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import xxhash

from evermesh.fault.snapshot.choosing import Version
from evermesh.fault.snapshot.keeper.portions import Portion, slot_files
from evermesh.fault.snapshot.stripes import CHUNK_BYTES, LEAST_PIECE_BYTES, MOST_PIECES, PIECE, Pieces

_RUN = struct.Struct("<QQ")


class Sealed(NamedTuple):
    """The part of a node of a snapshot."""

    version: Version
    portions: tuple[Portion, ...]
    pieces: Pieces
    """In the portions laid end to end."""

    @property
    def num_bytes(self) -> int:
        return sum(portion.num_bytes for portion in self.portions)

    def to_bytes(self) -> bytes:
        """``from_bytes`` reads it."""
        return json.dumps([self.version, self.portions]).encode() + b"\n" + self.pieces.tobytes()

    @classmethod
    def from_bytes(cls, told: bytes) -> Self:
        """Raises ``ValueError`` or ``TypeError`` if it is none."""
        line, _, pieces = told.partition(b"\n")
        version, portions = json.loads(line)
        portions = tuple(Portion(*portion) for portion in portions)
        return cls(Version(*version), portions, np.frombuffer(pieces, PIECE))


def sealed_by(area: Path, version: Version, portions: Sequence[Portion]) -> Sealed:
    """What the slots of a node hold of a snapshot.

    Raises:
        LookupError, OSError, ValueError: one of them holds nothing of it any more.
    """
    found = islice(_pieces(area, version, portions), MOST_PIECES)
    pieces = np.array([(start, num_bytes, 0, key, 0) for start, num_bytes, key in found], PIECE)
    return Sealed(version, tuple(portions), pieces)


def _pieces(area: Path, version: Version, portions: Sequence[Portion]) -> Iterator[tuple[int, int, int]]:
    """Start, bytes and key."""
    begin = 0
    for portion in portions:
        if portion.data_bytes:
            index = slot_files(area, version, portion.rank).index.read_bytes()
            extents = json.loads(index.partition(b"\n")[2])["extents"]
            yield from ((begin + start, num_bytes, key) for start, num_bytes, key in runs(extents, portion.data_bytes))
        begin += portion.num_bytes


def runs(extents: dict[str, list[dict[str, Any]]], data_bytes: int) -> Iterator[tuple[int, int, int]]:
    """The runs of a data file that others may have. Regions are cut at whole MiB, counted from where they begin, so that
    whoever has another part of the region has the same runs."""
    placed = [(extent["offset"], name, extent) for name, of_tensor in extents.items() for extent in of_tensor]
    placed.sort(key=lambda one: one[0])
    ends = [*(offset for offset, _, _ in placed[1:]), data_bytes]
    for (offset, name, extent), end in zip(placed, ends, strict=bool(placed)):
        item = (end - offset) // max(extent["stop"] - extent["start"], 1)
        region = xxhash.xxh3_64_intdigest(json.dumps([name, extent["region"]], sort_keys=True).encode())
        first, last = extent["start"] * item, extent["stop"] * item
        edges = [first, *range((first // CHUNK_BYTES + 1) * CHUNK_BYTES, last, CHUNK_BYTES), last]
        for start, stop in pairwise(edges):
            if stop - start >= LEAST_PIECE_BYTES:
                key = xxhash.xxh3_64_intdigest(_RUN.pack(start, stop), seed=region)
                yield offset + start - first, stop - start, key
