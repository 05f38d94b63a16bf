"""Which bytes several members of a stripe hold, so that they are coded once, or not at all.

A *piece* is a run of bytes in the data of a member, at most a chunk, that has a key: pieces with one key are to hold the
same bytes. Members tell each other their keys, then the digests of those pieces whose keys several have. What all have told
decides, by a pure function, so that all come to the same, and the record of the snapshot keeps it. Copies that differ are
none.

A piece that more members hold than the stripe may lose is coded by nobody: whatever the stripe survives leaves one of them.
Any other is coded by one of its holders.
"""

from collections.abc import Container, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from evermesh.fault.snapshot.stripes.errors import SnapshotsDiffer
from evermesh.fault.snapshot.stripes.payload import Digests, Payload
from evermesh.fault.snapshot.stripes.redundancy import what_to_code

PIECE = np.dtype([("start", "<u8"), ("num_bytes", "<u4"), ("is_coded", "<u4"), ("key", "<u8"), ("digest", "<u8")])
"""``start`` in the data of the member; ``digest`` is the xxh3-64 of the bytes, 0 until it is known."""
Pieces: TypeAlias = npt.NDArray[np.void]
"""Of one member, in the order of its data, apart."""
Keys: TypeAlias = npt.NDArray[np.uint64]
NO_PIECES: Pieces = np.zeros(0, PIECE)
LEAST_PIECE_BYTES = 4096
"""What is smaller is coded by all who hold it."""
MOST_PIECES = 1 << 20
"""Of a member; of what it holds beyond them nothing counts as a copy."""
Identity: TypeAlias = tuple[int, ...]
"""Key, digest and number of bytes of a piece."""
_SIZE = 2


def shared_keys(tables: Sequence[Pieces]) -> Keys:
    """The keys that several members have, ascending."""
    keys, counts = np.unique(np.concatenate([np.unique(table["key"]) for table in tables]), return_counts=True)
    found: Keys = keys[counts > 1]
    return found


def digests_of_pieces(data: Payload, pieces: Pieces) -> Digests:
    """Of the bytes of pieces."""
    return np.array([part.digest() for part in parts_of(data, pieces)], "<u8")


def parts_of(data: Payload, pieces: Pieces) -> Iterator[Payload]:
    """The bytes of pieces, one after the other."""
    for start, num_bytes in zip(pieces["start"].tolist(), pieces["num_bytes"].tolist(), strict=True):
        yield data.part(start, start + num_bytes)


def identities(pieces: Pieces) -> list[Identity]:
    """Equal of pieces that are copies of each other."""
    return list(zip(pieces["key"].tolist(), pieces["digest"].tolist(), pieces["num_bytes"].tolist(), strict=True))


def divide(tables: Sequence[Pieces], lengths: Sequence[int], tolerance: int) -> tuple[Pieces, ...]:
    """By member the pieces that others hold too, each coded by one of its holders or by nobody.

    Args:
        tables: by member, with digests.
        lengths: bytes of the data of each member.
        tolerance: members that may be lost.

    Raises:
        SnapshotsDiffer: a member has told pieces that its data cannot have.
    """
    for member, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        _check(table, length, member)
    known = [identities(table) for table in tables]
    holders: dict[Identity, set[int]] = {}
    for member, pieces in enumerate(known):
        for piece in pieces:
            holders.setdefault(piece, set()).add(member)
    holders = {piece: members for piece, members in holders.items() if len(members) > 1}
    sizes = {piece: piece[_SIZE] for piece in holders}
    for member, pieces in enumerate(known):  # what one member alone has counts where the others are to be balanced
        alone = (member,)
        sizes[alone] = lengths[member] - sum(piece[_SIZE] for piece in pieces if piece in holders)
        holders[alone] = {member}
    need = what_to_code(holders, sizes, tolerance)
    return tuple(
        _divided(table, pieces, holders, set(need.coded.get(member, ())))
        for member, (table, pieces) in enumerate(zip(tables, known, strict=True))
    )


def gaps(pieces: Pieces) -> Iterator[tuple[int, int]]:
    """What a member holds and does not code, as [start, stop) in its data."""
    copied = pieces[pieces["is_coded"] == 0]
    starts = copied["start"].tolist()
    return zip(
        starts, (start + size for start, size in zip(starts, copied["num_bytes"].tolist(), strict=True)), strict=True
    )


def copied_bytes(pieces: Pieces) -> int:
    """What a member holds and does not code."""
    return int(pieces["num_bytes"][pieces["is_coded"] == 0].sum(dtype=np.int64))


def _divided(
    table: Pieces, known: Sequence[Identity], shared: Container[Identity], coded: Container[Identity]
) -> Pieces:
    found = table[np.array([piece in shared for piece in known], bool)]
    found["is_coded"] = [piece in coded for piece in known if piece in shared]
    return found


def _check(table: Pieces, length: int, member: int) -> None:
    starts, ends = table["start"], table["start"] + table["num_bytes"]
    if not ((starts[1:] >= ends[:-1]).all() and (starts <= ends).all() and (ends <= length).all()):
        raise SnapshotsDiffer(
            f"member {member} told pieces that are not apart, or beyond its {length:,} bytes.", (member,)
        )
