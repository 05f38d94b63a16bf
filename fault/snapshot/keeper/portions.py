"""What a node has of a snapshot, laid end to end as the data of a member of a stripe: enough to make its slots anew.

Of each of its ranks in turn: the data file, the index, what it said besides tensors, and the record of the header.
"""

import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from evermesh.fault.snapshot.choosing import Version
from evermesh.fault.snapshot.keeper.slots import (
    NUM_SLOTS,
    RECORD_BYTES,
    USABLE,
    Header,
    Record,
    SlotFiles,
    State,
    held_by,
    ranks_in,
)


class Portion(NamedTuple):
    """The part of one rank; sizes in bytes."""

    rank: int
    data_bytes: int
    """0: the rank has no data file."""
    index_bytes: int
    objects_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.data_bytes + self.index_bytes + self.objects_bytes + RECORD_BYTES


def portions_of(area: Path, version: Version, ranks: Sequence[int]) -> tuple[Portion, ...]:
    """What the slots of ``ranks`` hold of a snapshot.

    Raises:
        LookupError: one of them holds nothing of it.
        OSError: a file has gone.
    """
    return tuple(_portion(area, version, rank) for rank in sorted(ranks))


def slot_files(area: Path, version: Version, rank: int) -> SlotFiles:
    """The slot of ``rank`` that holds its part of a snapshot. Raises ``LookupError`` if neither does."""
    return SlotFiles.of(area, rank, _slot_with(area, version, rank)[0])


def holds(area: Path, version: Version, portions: Sequence[Portion]) -> bool:
    """Whether the slots of a node hold just this of a snapshot, as far as headers and sizes tell."""
    try:
        return portions_of(area, version, [one.rank for one in portions]) == tuple(portions)
    except (LookupError, OSError):
        return False


@contextmanager
def held_views(area: Path, version: Version, ranks: Sequence[int]) -> Iterator[list[memoryview]]:
    """The bytes of a snapshot that the slots of ``ranks`` hold; what is written into them changes the slots.

    Raises:
        LookupError, OSError: as :func:`portions_of`.
    """
    with ExitStack() as stack:
        views: list[memoryview] = []
        for portion in portions_of(area, version, ranks):
            number, record = _slot_with(area, version, portion.rank)
            views += _file_views(stack, SlotFiles.of(area, portion.rank, number), portion)
            views.append(memoryview(bytearray(record.pack())))
        yield views


@contextmanager
def new_views(area: Path, version: Version, portions: Sequence[Portion]) -> Iterator[list[memoryview]]:
    """Room for a snapshot in slots that are there already; when the block ends without an error, they hold it.

    Until then, and if it fails, their state is ``writing``.

    Raises:
        ValueError: what was written is no part of this snapshot.
    """
    with ExitStack() as stack:
        views, made = [], []
        for portion in portions:
            files = SlotFiles.of(area, portion.rank, _slot_for(area, portion.rank, version))
            header = Header(files.header)
            stack.callback(header.close)
            header.begin(version.step)
            for file, num_bytes in ((files.index, portion.index_bytes), (files.objects, portion.objects_bytes)):
                file.write_bytes(bytes(num_bytes))
            views += _file_views(stack, files, portion)
            packed = bytearray(RECORD_BYTES)
            views.append(memoryview(packed))
            made.append((header, portion, packed))
        yield views
        for header, portion, packed in made:
            record = Record.unpack(bytes(packed))
            if record is None or (record.rank, record.version) != (portion.rank, version):
                raise ValueError(f"what was rebuilt for rank {portion.rank} is no part of step {version.step}")
            header.hold(record, "protected")


def change_state(area: Path, version: Version | None, ranks: Sequence[int] | None, state: State) -> None:
    """Of slots that are ``protecting``: say ``state`` instead. None: of every snapshot, of every rank."""
    for rank in ranks_in(area) if ranks is None else ranks:
        for held in held_by(area, rank):
            if held.state == "protecting" and version in (None, held.record.version):
                with suppress(OSError):
                    _change(SlotFiles.of(area, rank, held.number), held.record, state)


def _change(files: SlotFiles, record: Record, state: State) -> None:
    header = Header(files.header)
    try:
        if header.state == "protecting" and header.record == record and header.ticket == record.step:
            header.state = state
        if header.ticket != record.step:  # given up, and written to again meanwhile
            header.state = "writing"
    finally:
        header.close()


def _portion(area: Path, version: Version, rank: int) -> Portion:
    number, record = _slot_with(area, version, rank)
    files = SlotFiles.of(area, rank, number)
    if record.data_bytes and files.data.stat().st_size != record.data_bytes:
        raise LookupError(f"{files.data} is cut off")
    return Portion(rank, record.data_bytes, files.index.stat().st_size, files.objects.stat().st_size)


def _slot_with(area: Path, version: Version, rank: int) -> tuple[int, Record]:
    for held in held_by(area, rank):
        if held.state in USABLE and held.record.version == version:
            return held.number, held.record
    raise LookupError(f"rank {rank} holds nothing of step {version.step} of attempt {version.generation}")


def _slot_for(area: Path, rank: int, version: Version) -> int:
    """The slot that has it, else one that holds nothing, else the one with the older snapshot."""
    held = {one.number: one.record.version for one in held_by(area, rank)}
    worst = Version(-1, -1, "")
    there = [number for number in range(NUM_SLOTS) if SlotFiles.of(area, rank, number).folder.is_dir()]
    return min(there, key=lambda number: (held.get(number) != version, held.get(number, worst)))


def _file_views(stack: ExitStack, files: SlotFiles, portion: Portion) -> list[memoryview]:
    sizes = (
        (files.data, portion.data_bytes),
        (files.index, portion.index_bytes),
        (files.objects, portion.objects_bytes),
    )
    return [stack.enter_context(mapped(file, num_bytes)) for file, num_bytes in sizes if num_bytes]


@contextmanager
def mapped(file: Path, num_bytes: int) -> Iterator[memoryview]:
    """The bytes of a file of this size, to be read and written. Raises ``OSError`` if it has another."""
    descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size != num_bytes:
            raise OSError(f"{file} has {size:,} bytes, not {num_bytes:,}")
        memory = mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)
    try:
        yield memoryview(memory)
    finally:
        with suppress(BufferError):  # an array still refers to it: it goes with that
            memory.close()
