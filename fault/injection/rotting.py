"""One bit of a snapshot in the memory of a node, as rot would change it: behind the back of everybody. Imports no torch."""

import random
from pathlib import Path
from typing import NamedTuple

from evermesh.fault.injection.schedule import Flip
from evermesh.fault.snapshot.keeper.slots import HEADER_USED_BYTES, SlotFiles, held_by


class Byte(NamedTuple):
    """One bit of one byte of a file."""

    file: Path
    byte: int
    bit: int
    step: int
    """Of the snapshot that it belongs to."""

    def flip(self) -> None:
        """Flip it."""
        with self.file.open("r+b") as opened:
            opened.seek(self.byte)
            value = opened.read(1)[0]
            opened.seek(self.byte)
            opened.write(bytes([value ^ 1 << self.bit]))

    def __str__(self) -> str:
        return f"bit {self.bit} of byte {self.byte} of {self.file.name} of the snapshot of step {self.step}"


def choose_byte(fault: Flip, area: Path | None, rank: int, seed: str) -> Byte:
    """The bit that ``fault`` means in the newest snapshot of ``rank`` that is sealed; what it leaves open is drawn.

    Raises:
        LookupError: there is no snapshot, or it has no such byte or bit.
    """
    held = held_by(area, rank) if area is not None else []
    if area is None or not held:
        raise LookupError(f"rank {rank} has no snapshot in memory yet. Flip it in a later step, or set train.snapshot.")
    newest = max(held, key=lambda one: one.record.step)
    files, chance = SlotFiles.of(area, rank, newest.number), random.Random(seed)
    file, size = (
        (files.data, newest.record.data_bytes) if fault.what == "snapshot" else (files.header, HEADER_USED_BYTES)
    )
    byte = chance.randrange(max(1, size)) if fault.element is None else fault.element
    bit = chance.randrange(8) if fault.bit is None else fault.bit
    if byte >= size or bit >= 8:
        raise LookupError(f"the {fault.what} of rank {rank} has {size} bytes of 8 bits, but {fault} was asked for.")
    return Byte(file, byte, bit, newest.record.step)
