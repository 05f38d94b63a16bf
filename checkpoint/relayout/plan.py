"""Who gives what to whom, and in which round: a pure function of two shard maps, which every rank computes alone.

What two maps share is found tensor by tensor: the runs of all regions of a side, laid out along the logical tensor, are
joined with those of the other side. So the cost is that of the runs, not of all pairs of regions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.regions import IntArray, Runs, StoredForm, join, logical_runs
from evermesh.checkpoint.shard_map import Shard, ShardMap, TensorShards

_LARGEST_ITEM = max(dtype.num_bytes for dtype in DTYPES.values())
_LEAST_PART_BYTES = 1 << 16
"""A piece is cut for what is left of a round if at least so much of it fits there."""


_Lie = tuple[StoredForm, tuple[Shard, ...]]
"""All that decides what of a tensor lies where."""


class Piece(NamedTuple):
    """What a region of the source and one of the target have in common."""

    name: str
    source: int
    """Index of the shard in the tensor's source map."""
    target: int
    """The same in its target map."""
    runs: Runs
    """From the storage of the one region to that of the other."""
    item: int
    """Bytes of one element."""


class Parcel(NamedTuple):
    """Elements [start, stop) of a piece, counted along its runs: what is in one message of it."""

    piece: Piece
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Bytes that it adds to a message."""
        return (self.stop - self.start) * self.piece.item

    def runs(self) -> Runs:
        """Those of the piece that it holds."""
        return portion(self.piece.runs, self.start, self.stop)


@dataclass(frozen=True, slots=True)
class Round:
    """The messages of one rank that are under way together: by other rank, what is in the one to or from it."""

    sends: dict[int, list[Parcel]] = field(default_factory=dict)
    receives: dict[int, list[Parcel]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What one rank does."""

    copies: tuple[Piece, ...]
    """What it holds already, and keeps."""
    rounds: tuple[Round, ...]
    """Those that it takes part in, in the order that all ranks have."""
    sent_bytes: tuple[int, ...]
    """By rank, of all of them."""
    received_bytes: tuple[int, ...]


def make_plan(source: ShardMap, target: ShardMap, rank: int, nodes: Sequence[int], room_bytes: int) -> Plan:
    """What ``rank`` sends, receives and keeps, so that all ranks get what they hold in ``target``.

    Both maps hold the same tensors. A rank receives exactly those elements that it does not hold. Of several holders the
    one gives that has given least so far, of those on the receiver's node if there are any. In each round no rank sends
    and receives more than ``room_bytes`` together, and every rank has its rounds as early as it can: those of ranks that
    have nothing to do with each other are under way at the same time.

    Args:
        source: who holds what.
        target: who is to hold what.
        rank: of the caller.
        nodes: the node of every rank.
        room_bytes: at least the largest element.
    """
    assert room_bytes >= _LARGEST_ITEM, "an element has to fit"
    given, taken = [0] * len(nodes), [0] * len(nodes)
    schedule, own = _Schedule(len(nodes), room_bytes), dict[int, Round]()
    copies: list[Piece] = []
    for piece, holders, receivers in _pieces(source, target):
        size = piece.runs.num_elements
        if rank in receivers and rank in holders:
            copies.append(piece)
        for receiver in receivers:
            if receiver in holders:
                continue
            giver = _giver(holders, receiver, nodes, given)
            given[giver] += size * piece.item
            taken[receiver] += size * piece.item
            for number, parcel in schedule.place(piece, giver, receiver):
                if rank in (giver, receiver):
                    mine = own.setdefault(number, Round())
                    side, other = (mine.sends, receiver) if rank == giver else (mine.receives, giver)
                    side.setdefault(other, []).append(parcel)
    rounds = tuple(own[number] for number in sorted(own))
    return Plan(tuple(copies), rounds, tuple(given), tuple(taken))


def shared(source: TensorShards, target: TensorShards) -> list[tuple[int, int, Runs]]:
    """(shard of the source, shard of the target, what they share) wherever they share anything, in logical order."""
    have, have_bases = _end_to_end(source)
    want, want_bases = _end_to_end(target)
    runs = join(have, want)
    owner = np.searchsorted(have_bases, runs.source, "right") - 1
    taker = np.searchsorted(want_bases, runs.destination, "right") - 1
    pair = owner * len(target.shards) + taker
    order = np.argsort(pair, kind="stable")
    cuts = np.flatnonzero(np.diff(pair[order])) + 1
    found = []
    for of_pair in np.split(order, cuts) if len(order) else ():
        a, b = int(owner[of_pair[0]]), int(taker[of_pair[0]])
        lengths = runs.length[of_pair]
        found.append(
            (a, b, Runs(runs.source[of_pair] - have_bases[a], runs.destination[of_pair] - want_bases[b], lengths))
        )
    return found


def portion(runs: Runs, start: int, stop: int) -> Runs:
    """Elements [start, stop) of ``runs``, counted along them."""
    ends = np.cumsum(runs.length)
    first, last = np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop, "left") + 1
    source, destination, length = (part[first:last].copy() for part in (runs.source, runs.destination, runs.length))
    if len(length):
        length[-1] -= ends[first + len(length) - 1] - stop
        head = start - (ends[first] - runs.length[first])
        source[0] += head
        destination[0] += head
        length[0] -= head
    return Runs(source, destination, length)


def _pieces(source: ShardMap, target: ShardMap) -> Iterator[tuple[Piece, tuple[int, ...], tuple[int, ...]]]:
    """Every piece with the ranks that hold it and those that are to hold it, in the order of the target's tensors."""
    known: dict[tuple[_Lie, _Lie], list[tuple[int, int, Runs]]] = {}
    for name, wanted in target.tensors.items():
        there = source.tensors[name]
        key = ((there.form, there.shards), (wanted.form, wanted.shards))  # moments lie as their parameters do
        if key not in known:
            known[key] = shared(there, wanted)
        item = DTYPES[wanted.dtype].num_bytes
        for a, b, runs in known[key]:
            yield Piece(name, a, b, runs, item), there.shards[a].ranks, wanted.shards[b].ranks


def _end_to_end(tensor: TensorShards) -> tuple[Runs, IntArray]:
    """The logical elements of all shards: source is the logical position, ascending, destination the offset in their
    storages laid end to end; and where each storage begins. One place between two keeps runs of both apart."""
    sizes = [shard.region.num_elements + 1 for shard in tensor.shards]
    bases = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
    found = [logical_runs(shard.region, tensor.form) for shard in tensor.shards]
    source = np.concatenate([np.empty(0, np.int64), *(runs.source for runs in found)])
    destination = np.concatenate(
        [np.empty(0, np.int64), *(runs.destination + base for runs, base in zip(found, bases, strict=True))]
    )
    length = np.concatenate([np.empty(0, np.int64), *(runs.length for runs in found)])
    order = np.argsort(source)
    return Runs(source[order], destination[order], length[order]), bases


def _giver(holders: Sequence[int], receiver: int, nodes: Sequence[int], given: Sequence[int]) -> int:
    near = [rank for rank in holders if nodes[rank] == nodes[receiver]]
    return min(near or holders, key=lambda rank: (given[rank], (rank - receiver) % len(nodes)))


class _Schedule:
    """The rounds of all ranks, filled as they come: what two ranks exchange goes into the first rounds where both have
    room."""

    def __init__(self, ranks: int, room_bytes: int) -> None:
        self._room = room_bytes
        self._used: list[list[int]] = [[] for _ in range(ranks)]
        """By rank, by round: bytes that it sends and receives there."""
        self._open = [0] * ranks
        """By rank: the first round that is not full."""

    def place(self, piece: Piece, giver: int, receiver: int) -> Iterator[tuple[int, Parcel]]:
        """The rounds of a piece, and what of it is in each."""
        start, size = 0, piece.runs.num_elements
        number = max(self._open[giver], self._open[receiver])
        while start < size:
            room = self._room - max(self._at(giver, number), self._at(receiver, number))
            fits = min(size - start, room // piece.item)
            if fits and (fits == size - start or fits * piece.item >= min(_LEAST_PART_BYTES, self._room // 2)):
                for rank in (giver, receiver):
                    self._used[rank][number] += fits * piece.item
                yield number, Parcel(piece, start, start + fits)
                start += fits
            number += 1
        for rank in (giver, receiver):
            while self._room - self._at(rank, self._open[rank]) < _LARGEST_ITEM:
                self._open[rank] += 1

    def _at(self, rank: int, number: int) -> int:
        used = self._used[rank]
        used.extend([0] * (number + 1 - len(used)))
        return used[number]
