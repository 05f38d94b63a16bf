"""One member's part in rebuilding a snapshot: it computes its share of what is lost, out of chunks that others send it.

Whatever a member holds is compared with the record before anything is sent; a corrupt chunk counts as lost and is
replaced too.
"""

import struct
from collections import deque
from collections.abc import Generator, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import xxhash

from evermesh.fault.snapshot.coding.engine import ByteArray, Engine
from evermesh.fault.snapshot.stripes.copies import MOST_PIECES
from evermesh.fault.snapshot.stripes.errors import (
    ChunkCorrupt,
    RecordUnreadable,
    SnapshotsDiffer,
    TransferFailed,
)
from evermesh.fault.snapshot.stripes.fetching import Fetching, corrupt_pieces, fetches
from evermesh.fault.snapshot.stripes.frames import (
    Header,
    Kind,
    Transfer,
    chunk,
    frame,
    read_frame,
    read_header,
    read_into,
)
from evermesh.fault.snapshot.stripes.membership import Membership
from evermesh.fault.snapshot.stripes.payload import Payload
from evermesh.fault.snapshot.stripes.pump import PIECE_BYTES, Incoming, Outgoing
from evermesh.fault.snapshot.stripes.record import StripeRecord
from evermesh.fault.snapshot.stripes.rotation import CHUNK_BYTES, num_rows, parity_bytes
from evermesh.fault.snapshot.stripes.schedule import Damage, Repair, repairs

_HELD = struct.Struct("<?QI")
"""Whether the sender holds the snapshot, the root of its record, and the number of its corrupt chunks; behind it their rows,
and the numbers of its corrupt pieces that it does not code, 4 bytes each."""
_WINDOW = 8
"""Rows that a member computes at a time."""


class Held(NamedTuple):
    """Where a member has its snapshot, or where it is to be put. All is writable: corrupt chunks are replaced."""

    data: Payload
    parity: Payload


class _Work(NamedTuple):
    """A repair that is being computed."""

    repair: Repair
    outputs: tuple[ByteArray, ...]
    waiting: set[int]
    """Sources that have not come."""


class Rebuilding:
    """Phases of generators for every other member: say what one holds, move chunks, then copies, say that one is done."""

    def __init__(
        self,
        mine: Membership,
        step: int,
        record: StripeRecord | None,
        held: Held,
        engine: Engine,
        absent: frozenset[int],
    ) -> None:
        self._mine, self._held, self._engine, self._absent = mine, held, engine, absent
        self._transfer = Transfer(step, mine.generation)
        if record is not None and (record.step, record.code) != (step, mine.code):
            raise SnapshotsDiffer(
                f"the record is of step {record.step} and code {record.code}, not {step} and {mine.code}.", (mine.rank,)
            )
        self.record = record
        self._roots = {mine.rank: record.root if record else None}
        self.corrupt: dict[int, frozenset[int]] = {mine.rank: frozenset(self._scrub()) if record else frozenset()}
        pieces = corrupt_pieces(record, mine.rank, held.data) if record else frozenset[int]()
        self.corrupt_pieces = {mine.rank: pieces}
        self._room = [np.empty(CHUNK_BYTES, np.uint8) for _ in range(_WINDOW * mine.code.parts)]
        self._to_start: deque[Repair] = deque()
        self._works: dict[int, _Work] = {}
        self._plan: list[Repair] = []
        self._ready: dict[int, deque[tuple[int, ByteArray]]] = {}
        self._scratch = memoryview(bytearray(PIECE_BYTES))

    @property
    def lost(self) -> frozenset[int]:
        """Members that hold nothing."""
        return frozenset(member for member, root in self._roots.items() if root is None)

    def announce(self) -> Outgoing:
        """Say what one holds."""
        root = self._roots[self._mine.rank]
        rows, pieces = sorted(self.corrupt[self._mine.rank]), sorted(self.corrupt_pieces[self._mine.rank])
        numbers = np.array([*rows, *pieces], "<u4").tobytes()
        return frame(self._transfer, Kind.REBUILD, _HELD.pack(root is not None, root or 0, len(rows)) + numbers)

    def hear(self, peer: int) -> Incoming:
        """Learn the same of another member."""
        most = _HELD.size + 4 * (self._most_rows() + MOST_PIECES)
        told = yield from read_frame(self._transfer, Kind.REBUILD, peer, _HELD.size, most)
        holds, root, num_rows = _HELD.unpack_from(told)
        self._roots[peer] = root if holds else None
        numbers = np.frombuffer(told, "<u4", (len(told) - _HELD.size) // 4, _HELD.size).tolist()
        self.corrupt[peer], self.corrupt_pieces[peer] = frozenset(numbers[:num_rows]), frozenset(numbers[num_rows:])

    def agree(self) -> None:
        """Check that all who hold the snapshot hold the same.

        Raises:
            SnapshotsDiffer: they do not.
            TransferFailed: nobody holds it.
        """
        by_root: dict[int, list[int]] = {}
        for member, root in sorted(self._roots.items()):
            if root is not None:
                by_root.setdefault(root, []).append(member)
        if not by_root:
            raise TransferFailed(f"no member of stripe {self._mine.stripe!r} holds step {self._transfer.step}.")
        if len(by_root) > 1:
            told = "; ".join(f"members {members} hold {root:016x}" for root, members in by_root.items())
            raise SnapshotsDiffer(f"step {self._transfer.step} was protected more than once: {told}.")

    @property
    def first_holder(self) -> int:
        """The member that sends the record to those that have none."""
        return min(member for member, root in self._roots.items() if root is not None)

    def give_record(self) -> Outgoing:
        """Send the record."""
        assert self.record is not None, "only a holder sends it"
        return frame(self._transfer, Kind.RECORD, self.record.to_bytes())

    def take_record(self, peer: int) -> Incoming:
        """Receive the record, and check it against the root that all holders told."""
        most = 4096 + self._mine.code.parts * (16 * (1 + self._most_rows()) + 32 * MOST_PIECES)
        text = yield from read_frame(self._transfer, Kind.RECORD, peer, 0, most)
        try:
            record = StripeRecord.from_bytes(text)
        except RecordUnreadable as error:
            raise TransferFailed(f"member {peer} sent a record that cannot be read: {error}", (peer,)) from error
        if (record.root, record.step, record.code) != (self._roots[peer], self._transfer.step, self._mine.code):
            raise SnapshotsDiffer(f"member {peer} sent the record of another snapshot.", (peer,))
        self.record = record

    def begin(self) -> None:
        """Plan, once everybody knows the record.

        Raises:
            TooManyErasures: the snapshot cannot be rebuilt.
            TransferFailed: what is lost here does not fit into the room there is, or a copy of it is coded by who is absent.
        """
        record = self._known()
        self._check_room(record)
        corrupt = {member: rows for member, rows in self.corrupt.items() if member not in self.lost}
        damage = Damage(self.lost, self._absent, corrupt)
        plan = repairs(record, damage)
        self._plan = plan
        wanted = fetches(record, damage, self.corrupt_pieces)
        self.fetching = Fetching(self._mine.rank, self._transfer, record, self._held.data, wanted)
        self._to_start = deque(repair for repair in plan if repair.by == self._mine.rank)
        self._ready = {member: deque() for member in self.lost}

    def give(self, peer: int) -> Outgoing:
        """Send the chunks that ``peer`` computes from, or what it lacks."""
        for repair in self._plan:
            if repair.by == peer and self._mine.rank in repair.sources:
                yield from chunk(self._transfer, repair.row, self._own(repair.row))
        for _ in [repair for repair in self._plan if repair.by == self._mine.rank != peer and peer in repair.targets]:
            while not self._ready[peer]:
                self._start()
                if not self._ready[peer]:
                    yield None
            row, block = self._ready[peer].popleft()
            yield from chunk(self._transfer, row, Payload([block[: self._size(row, peer)].data]))
            self._room.append(block)

    def take(self, peer: int) -> Incoming:
        """Receive what one computes from, or what one lacks."""
        for repair in self._plan:
            if repair.by == self._mine.rank and peer in repair.sources:
                while repair.row not in self._works:
                    self._start()
                    if repair.row not in self._works:
                        yield None
                yield from self._take_source(self._works[repair.row], peer)
        rows = {repair.row for repair in self._plan if repair.by == peer and self._mine.rank in repair.targets}
        while rows:
            rows.remove((yield from self._take_lost(peer, rows)))

    def tell(self) -> Outgoing:
        """Say that one has all."""
        return frame(self._transfer, Kind.DONE, b"")

    def told(self, peer: int) -> Incoming:
        """Hear that another has all."""
        yield from read_frame(self._transfer, Kind.DONE, peer, 0, 0)

    def _take_source(self, work: _Work, peer: int) -> Incoming:
        row = work.repair.row
        size = self._size(row, peer)
        header = yield from read_header(self._transfer, Kind.CHUNK, peer)
        self._check_header(header, {row}, peer, peer)
        column = _column(work.repair, peer)
        digest, position = xxhash.xxh3_64(), 0
        while position < size:
            count = yield self._scratch[: min(size - position, PIECE_BYTES)]
            piece = self._scratch[:count]
            digest.update(piece)
            self._add(column, np.frombuffer(piece, np.uint8), work.outputs, position)
            position += count
        self._check_digest(digest.intdigest(), row, peer, peer)
        work.waiting.remove(peer)
        self._finish(work)

    def _take_lost(self, peer: int, rows: set[int]) -> Generator[memoryview | None, int, int]:
        header = yield from read_header(self._transfer, Kind.CHUNK, peer)
        self._check_header(header, rows, self._mine.rank, peer)
        digest = yield from read_into(self._own(header.row))
        self._check_digest(digest, header.row, self._mine.rank, peer)
        return header.row

    def _start(self) -> None:
        """Begin with as many rows as there is room for, in order: none waits for room that a later one has."""
        while self._to_start and len(self._room) >= len(self._to_start[0].targets):
            repair = self._to_start.popleft()
            outputs = tuple(self._room.pop() for _ in repair.targets)
            for output in outputs:
                output.fill(0)
            work = _Work(repair, outputs, set(repair.sources) - {self._mine.rank})
            self._works[repair.row] = work
            if self._mine.rank in repair.sources:
                for position, view in self._own(repair.row).pieces():
                    self._add(_column(repair, self._mine.rank), np.frombuffer(view, np.uint8), outputs, position)
            self._finish(work)

    def _finish(self, work: _Work) -> None:
        if work.waiting:
            return
        row = work.repair.row
        for target, block in zip(work.repair.targets, work.outputs, strict=True):
            computed = block[: self._size(row, target)]
            self._check_digest(xxhash.xxh3_64_intdigest(computed.data), row, target, self._mine.rank)
            if target != self._mine.rank:
                self._ready[target].append((row, block))
                continue
            for position, view in self._own(row).pieces():
                view[:] = computed[position : position + view.nbytes].data
            self._room.append(block)

    def _add(self, column: tuple[int, ...], source: ByteArray, outputs: tuple[ByteArray, ...], position: int) -> None:
        self._engine.add(column, source, [output[position : position + source.nbytes] for output in outputs])

    def _scrub(self) -> Iterator[int]:
        """Rows in which one's own chunk is not what the record says."""
        record = self._known()
        self._check_room(record)
        for row in range(record.rows.number):
            if self._size(row, self._mine.rank) and self._own(row).digest() != record.digest(row, self._mine.rank):
                yield row

    def _own(self, row: int) -> Payload:
        rows, rank = self._known().rows, self._mine.rank
        whole = self._held.parity if rows.keeps_parity[row, rank] else self._coded
        return whole.chunk(int(rows.slot[row, rank]), int(rows.size[row, rank]))

    @cached_property
    def _coded(self) -> Payload:
        return self._known().coded(self._mine.rank, self._held.data)

    def _size(self, row: int, member: int) -> int:
        return int(self._known().rows.size[row, member])

    def _most_rows(self) -> int:
        """Rows of any snapshot that fits here."""
        room = max(self._held.data.nbytes, self._held.parity.nbytes // self._mine.code.parity * self._mine.code.data)
        known = [max(self.record.lengths)] if self.record else []
        return num_rows(self._mine.code, max(room, *known, CHUNK_BYTES))

    def _check_room(self, record: StripeRecord) -> None:
        needed = record.data_bytes(self._mine.rank), parity_bytes(record.code, max(record.lengths))
        room = self._held.data.nbytes, self._held.parity.nbytes
        if room[0] < needed[0] or room[1] < needed[1]:
            raise TransferFailed(
                f"step {record.step} of member {self._mine.rank} takes {needed[0]:,} bytes of data and {needed[1]:,} of "
                f"parity; there is room for {room[0]:,} and {room[1]:,}.",
                (self._mine.rank,),
            )

    def _check_header(self, header: Header, rows: set[int], owner: int, peer: int) -> None:
        if header.row not in rows or header.length != self._size(header.row, owner):
            raise SnapshotsDiffer(
                f"member {peer} sent {header.length:,} bytes of row {header.row}, which is not in its plan.", (peer,)
            )

    def _check_digest(self, digest: int, row: int, owner: int, sender: int) -> None:
        if digest != self._known().digest(row, owner):
            raise ChunkCorrupt(
                f"what member {sender} has of member {owner} in row {row} has another digest than the record says: it "
                "changed since it was compared, or on the way. Rebuild again.",
                (sender,),
            )

    def _known(self) -> StripeRecord:
        assert self.record is not None, "the record is known before anything is planned"
        return self.record


def _column(repair: Repair, source: int) -> tuple[int, ...]:
    at = repair.sources.index(source)
    return tuple(row[at] for row in repair.rows)
