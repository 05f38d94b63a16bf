"""The file of a ring in shared memory, as the rank that writes it has it."""

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self, get_args

from evermesh.checkpoint.background.memory import allocate
from evermesh.fault.recorder import ring_format as form
from evermesh.fault.recorder.names import ring_line
from evermesh.fault.snapshot.keeper.area import started_at
from evermesh.parallelism.collectives import Moment, Phase

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_CLOCK_TRIES, _CLOCK_CLOSE_NS = 4, 1_000_000


@dataclass(frozen=True, slots=True)
class RingSpec:
    """Whose ring it is and where it lies."""

    path: Path
    rank: int
    world_size: int
    generation: int
    node: str
    owner: str
    """Directory of the run, or whatever its maker is known by."""


class Ring:
    """The ring of this process. One process writes it, through one :class:`Ring` or the native tap that was given it.

    The memory stays mapped as long as the object is referenced; the file belongs to whoever owns its folder.
    """

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path, self.memory = path, memory
        self.words, self.octets = memoryview(memory).cast("Q"), memoryview(memory)
        self.here = [0, 0]
        """Step and phase, for a tap in Python."""

    @classmethod
    def make(cls, spec: RingSpec) -> Self:
        """Make the file with all its pages, empty.

        Raises:
            RoomMissing: shared memory has no room for it; says how much is missing. Nothing is left.
            FileExistsError: another process has made it already.
        """
        descriptor = os.open(spec.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            allocate(descriptor, form.RING_BYTES)
            memory = mmap.mmap(descriptor, form.RING_BYTES)
        except OSError:
            spec.path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        ring = cls(spec.path, memory)
        ring._describe(spec)
        return ring

    def note_clocks(self) -> None:
        """Write down by how much the wall clock is ahead of the monotonic one; it may be set at any time."""
        for _ in range(_CLOCK_TRIES):
            before, wall, after = time.monotonic_ns(), time.time_ns(), time.monotonic_ns()
            if after - before < _CLOCK_CLOSE_NS:  # else this thread had to wait in between
                break
        between = (before + after) // 2
        self.words[form.WALL_OFFSET_AT] = (wall - between) % (1 << 64)
        self.words[form.CLOCK_AT] = between

    def note_moment(self, step: int, phase: Phase) -> None:
        """Write down where this rank is."""
        moment = pack_moment(step, phase)
        self.here[:] = moment & 0xFFFFFFFF, moment >> form.STEP_BITS
        self.words[form.MOMENT_AT] = moment

    def note_tier(self, tier: str) -> None:
        """Write down who records."""
        self.words[form.TIER_AT] = form.TIERS.index(tier)

    def append_name(self, line: bytes) -> bool:
        """Append a line to the names; False where there is no room, which is counted. One caller at a time."""
        used = self.words[form.NAMES_USED_AT]
        if used + len(line) > form.NAMES_BYTES:
            self.words[form.NAMES_LOST_AT] += 1
            return False
        begin = form.HEADER_BYTES + used
        self.memory[begin : begin + len(line)] = line
        self.words[form.NAMES_USED_AT] = used + len(line)
        return True

    def _describe(self, spec: RingSpec) -> None:
        words, boot = self.words, int(_BOOT_ID.read_text().strip().replace("-", ""), 16)
        words[form.VERSION_AT], words[form.SLOTS_AT] = form.VERSION, form.NUM_SLOTS
        words[form.PID_AT], words[form.STARTED_AT] = os.getpid(), started_at(os.getpid()) or 0
        words[form.BOOT_AT], words[form.BOOT_AT + 1] = boot >> 64, boot % (1 << 64)
        words[form.RANK_AT], words[form.WORLD_AT] = spec.rank, spec.world_size
        words[form.GENERATION_AT] = spec.generation
        self.note_clocks()
        self.note_moment(0, "start-up")
        self.append_name(ring_line(spec.node, spec.owner))
        words[form.MAGIC_AT] = form.MAGIC


def pack_moment(step: int, phase: Phase) -> int:
    """Step and phase as the header holds them."""
    return _PHASE_BITS[phase] | (step & 0xFFFFFFFF)


def packed(moment: Moment) -> int:
    """Where a thread stands, likewise."""
    return _PHASE_BITS[moment.phase] | (moment.step & 0xFFFFFFFF)


_PHASE_BITS = {phase: number << form.STEP_BITS for number, phase in enumerate(get_args(Phase))}
