"""Where a rank's snapshots lie, and how whoever looks knows what a slot holds.

AREA/rank-00003/slot-0/header                    state and record
                       rank-00003.safetensors    what the rank copies into, mapped by it; a file of a checkpoint
                       rank-00003.index          of that file, made by the keeper
                       objects.json              what the rank says besides tensors
               /slot-1/...

EMPTY ── worker ──► WRITING ── keeper: digests, index, record ──► SEALED ── worker: all ranks have theirs ──► COMMITTED

In a stripe the keeper seals it as PROTECTING, and says PROTECTED when the other nodes have their parity, or SEALED when that
failed; ranks wait for one of both.

The state is one aligned word, which no kill can tear; the record is written before the state says that it is valid, with a
digest of its own. Whoever cannot read one of both takes the other slot.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self

import xxhash

from evermesh.checkpoint.committing import data_name, index_name
from evermesh.fault.snapshot.choosing import Version

NUM_SLOTS = 2
HEADER_BYTES = 4096
State = Literal["empty", "writing", "protecting", "sealed", "protected", "committed", "damaged"]
_WORDS: dict[State, bytes] = {
    "empty": bytes(8),
    "writing": b"writing.",
    "protecting": b"parity..",
    "sealed": b"sealed..",
    "protected": b"protect.",
    "committed": b"commit..",
    "damaged": b"damaged.",
}
_STATES = {word: state for state, word in _WORDS.items()}
USABLE: frozenset[State] = frozenset(("protecting", "sealed", "protected", "committed"))
"""States in which a slot holds all of a snapshot."""
_STATE_AT, _TICKET_AT, _RECORD_AT = 0, 8, 64
_MAGIC, _VERSION = b"evermesh", 1
_RECORD = struct.Struct("<8sIIQQQQ16s64s")
_DIGEST = struct.Struct("<Q")
RECORD_BYTES = _RECORD.size + _DIGEST.size
HEADER_USED_BYTES = _RECORD_AT + RECORD_BYTES
"""The rest of a header is empty."""


class Record(NamedTuple):
    """What a slot holds."""

    rank: int
    generation: int
    """Of the attempt that made it."""
    step: int
    data_bytes: int
    """Of the data file; 0: the rank writes nothing, and has none."""
    index_bytes: int
    root: str
    """xxh3-64 of the first line of the index, which holds that of the rest."""
    shard_map: str
    """Digest of the map that the ranks of the attempt have."""

    @property
    def version(self) -> Version:
        """Of which snapshot it is a part."""
        return Version(self.generation, self.step, self.shard_map)

    def pack(self) -> bytes:
        """The record with its digest."""
        sizes = (self.generation, self.step, self.data_bytes, self.index_bytes)
        packed = _RECORD.pack(_MAGIC, _VERSION, self.rank, *sizes, self.root.encode(), self.shard_map.encode())
        return packed + _DIGEST.pack(xxhash.xxh3_64_intdigest(packed))

    @classmethod
    def unpack(cls, payload: bytes) -> Self | None:
        """The record that ``pack`` made; None if it is torn, altered or of another version."""
        packed, digest = payload[: _RECORD.size], payload[_RECORD.size : RECORD_BYTES]
        if len(digest) != _DIGEST.size or _DIGEST.unpack(digest)[0] != xxhash.xxh3_64_intdigest(packed):
            return None
        magic, version, rank, generation, step, data_bytes, index_bytes, root, shard_map = _RECORD.unpack(packed)
        if (magic, version) != (_MAGIC, _VERSION):
            return None
        digests = (text.rstrip(b"\0").decode() for text in (root, shard_map))
        return cls(rank, generation, step, data_bytes, index_bytes, *digests)


class Header:
    """The header of a slot, mapped: what one process writes the others see at once."""

    def __init__(self, file: Path) -> None:
        with file.open("r+b") as opened:
            if os.fstat(opened.fileno()).st_size != HEADER_BYTES:
                raise OSError(f"{file} is no header of a slot")
            self._memory = mmap.mmap(opened.fileno(), HEADER_BYTES)

    @property
    def state(self) -> State | None:
        """None: no state at all."""
        return _STATES.get(self._memory[_STATE_AT : _STATE_AT + 8])

    @state.setter
    def state(self, state: State) -> None:
        self._memory[_STATE_AT : _STATE_AT + 8] = _WORDS[state]

    @property
    def ticket(self) -> int:
        """The step of the copy that was begun last."""
        return int.from_bytes(self._memory[_TICKET_AT : _TICKET_AT + 8], "little")

    def begin(self, step: int) -> None:
        """Say that from now on the slot is being written to."""
        self._memory[_TICKET_AT : _TICKET_AT + 8] = step.to_bytes(8, "little")
        self.state = "writing"

    @property
    def record(self) -> Record | None:
        """None: torn, altered, or there is none yet."""
        return Record.unpack(self._memory[_RECORD_AT : _RECORD_AT + RECORD_BYTES])

    def hold(self, record: Record, state: State) -> None:
        """Say what the slot holds, and then that it does."""
        packed = record.pack()
        self._memory[_RECORD_AT : _RECORD_AT + len(packed)] = packed
        self.state = state

    def close(self) -> None:
        """Unmap it."""
        self._memory.close()


@dataclass(frozen=True, slots=True)
class SlotFiles:
    """Where one of the slots of a rank is."""

    folder: Path
    rank: int

    @classmethod
    def of(cls, area: Path, rank: int, number: int) -> Self:
        """Slot ``number`` of ``rank`` in the area of a keeper."""
        return cls(area / f"rank-{rank:05d}" / f"slot-{number}", rank)

    @property
    def header(self) -> Path:
        return self.folder / "header"

    @property
    def data(self) -> Path:
        return self.folder / data_name(self.rank)

    @property
    def index(self) -> Path:
        return self.folder / index_name(self.rank)

    @property
    def objects(self) -> Path:
        return self.folder / "objects.json"


class Held(NamedTuple):
    """A slot, as somebody finds it who has no part in it."""

    number: int
    state: State
    record: Record


def held_by(area: Path, rank: int) -> list[Held]:
    """The slots of ``rank`` that hold all of a snapshot, as their headers say; what is not legible is left out."""
    found = []
    for number in range(NUM_SLOTS):
        try:
            payload = SlotFiles.of(area, rank, number).header.read_bytes()
        except OSError:
            continue
        state = _STATES.get(payload[_STATE_AT : _STATE_AT + 8])
        record = Record.unpack(payload[_RECORD_AT:]) if len(payload) == HEADER_BYTES else None
        if state in USABLE and record is not None and record.rank == rank:
            found.append(Held(number, state, record))
    return found


def ranks_in(area: Path) -> list[int]:
    """The ranks that have slots in an area."""
    return sorted(int(folder.name.removeprefix("rank-")) for folder in area.glob("rank-*"))
