"""Reading a ring from outside, while it is written, or after its writer was stopped or killed; without any lock."""

import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evermesh.fault.process_state import ProcessState
from evermesh.fault.recorder import ring_format as form
from evermesh.fault.recorder.errors import RingUnreadable
from evermesh.fault.recorder.names import Names, parse_names
from evermesh.fault.recorder.record import NO_PEER, PHASES, RECORD
from evermesh.fault.recorder.trace import RankTrace
from evermesh.fault.snapshot.keeper.area import started_at
from evermesh.parallelism.collectives import Phase

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_SIGN = 1 << 63
_TRIES = 4
assert RECORD.itemsize == form.RECORD_BYTES


@dataclass(frozen=True, slots=True)
class GroupProgress:
    """How far a group is on one rank, by torch's own counters: they count what no tap sees, too."""

    begun: int
    """The last of its collectives that was begun, from 1; 0: none."""
    over: int
    """The last that is over."""


@dataclass(frozen=True, slots=True)
class RingState:
    """What the header of a ring says besides its trace."""

    generation: int
    world_size: int
    tier: str
    """Who records: see ``ring_format.TIERS``."""
    owner: str
    started: int
    """Clock ticks from the start of the machine to that of the process."""
    is_of_this_boot: bool
    """Else its clocks mean nothing now."""
    beat_ns: int
    """Monotonic clock of the last heartbeat: one that stays behind means that Python does not run there."""
    names_lost: int
    """Names for which there was no room."""
    groups: dict[int, GroupProgress]
    """By the index that records hold."""


def read_ring(path: Path) -> tuple[RankTrace, RingState]:
    """What the ring in ``path``, or a copy of one, holds now.

    Raises:
        RingUnreadable: it is none, is being made, or is of another version.
        OSError: it is gone.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < form.RECORDS_AT or (size - form.RECORDS_AT) % RECORD.itemsize:
            raise RingUnreadable(f"{path} has {size:,} bytes, a ring {form.RING_BYTES:,}: it is being made, or none.")
        memory = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
    words = np.frombuffer(memory, "<u8", form.HEADER_BYTES // form.WORD_BYTES)
    if int(words[form.MAGIC_AT]) != form.MAGIC or int(words[form.VERSION_AT]) != form.VERSION:
        raise RingUnreadable(f"{path} is no ring of version {form.VERSION}, or is being made.")
    read_ns = time.monotonic_ns()
    # names after records: what a record names was appended before it
    records = read_records(np.frombuffer(memory, RECORD, offset=form.RECORDS_AT), int(words[form.SLOTS_AT]))
    head = words.copy()
    names = _names(memory, int(words[form.NAMES_USED_AT]))
    return trace_of(head, records, names, read_ns), _state(head, names)


def process_of(trace: RankTrace, state: RingState) -> ProcessState | None:
    """What the process that wrote a ring of this machine does now; None: it has ended."""
    return process_at(trace.pid, state.started) if state.is_of_this_boot else None


def process_at(pid: int, started: int | None) -> ProcessState | None:
    """What a process does now, if it is the one that was started then; None: it has ended."""
    return ProcessState.of(pid) if started_at(pid) == started else None


def read_records(slots: np.ndarray, num_slots: int) -> np.ndarray:
    """The whole records of ``slots``, oldest first and without gaps, while another process may be writing them.

    A record counts if its sequence number was the same before and after it was copied: a writer changes the number first
    and last. One that a thread has begun to write, and others after it have finished, is told as ``unknown``.
    """
    for _ in range(_TRIES):
        before = slots["sequence"].copy()
        copied = slots.copy()
        after = slots["sequence"].copy()
        if (
            int(after.max(initial=0)) - int(before.max(initial=0)) < num_slots // 2
        ):  # else this thread had to wait meanwhile
            break
    places = np.arange(len(slots), dtype=np.uint64)
    whole = (before == after) & (copied["sequence"] == before) & (before != 0)
    whole &= (before - np.uint64(1)) % np.uint64(num_slots) == places
    if not whole.any():
        return np.empty(0, RECORD)
    last = int(before[whole].max())
    sequences = np.arange(max(1, last - num_slots + 1), last + 1, dtype=np.uint64)
    slot_of = ((sequences - np.uint64(1)) % np.uint64(num_slots)).astype(np.int64)
    found = copied[np.minimum(slot_of, len(slots) - 1)]
    missing = ~whole[np.minimum(slot_of, len(slots) - 1)] | (found["sequence"] != sequences)
    # slots at the old end are being written anew: the trace begins behind them
    old = np.flatnonzero(missing[: num_slots // 2]) if last > num_slots // 2 else np.empty(0, np.int64)
    begin = int(old[-1]) + 1 if len(old) else 0
    found, missing, sequences = found[begin:], missing[begin:], sequences[begin:]
    found[missing] = np.zeros(1, RECORD)
    found["peer"][missing] = NO_PEER
    found["sequence"][missing] = sequences[missing]
    return found


def _names(memory: mmap.mmap, used: int) -> Names:
    return parse_names(memory[form.HEADER_BYTES : form.HEADER_BYTES + min(used, form.NAMES_BYTES)])


def trace_of(head: np.ndarray, records: np.ndarray, names: Names, read_ns: int) -> RankTrace:
    """These records and names with what the words of a header say, read at ``read_ns``."""
    step, phase = unpack_moment(int(head[form.MOMENT_AT]))
    offset = int(head[form.WALL_OFFSET_AT])
    return RankTrace(
        rank=int(head[form.RANK_AT]),
        node=names.node,
        pid=int(head[form.PID_AT]),
        records=records,
        groups=names.groups,
        sites=names.sites,
        step=step,
        phase=phase,
        read_ns=read_ns,
        wall_offset_ns=offset - (1 << 64) if offset & _SIGN else offset,
    )


def _state(head: np.ndarray, names: Names) -> RingState:
    boot = int(head[form.BOOT_AT]) << 64 | int(head[form.BOOT_AT + 1])
    tier = int(head[form.TIER_AT])
    return RingState(
        generation=int(head[form.GENERATION_AT]),
        world_size=int(head[form.WORLD_AT]),
        tier=form.TIERS[tier] if tier < len(form.TIERS) else "none",
        owner=names.owner,
        started=int(head[form.STARTED_AT]),
        is_of_this_boot=boot == int(_BOOT_ID.read_text().strip().replace("-", ""), 16),
        beat_ns=int(head[form.BEAT_AT]),
        names_lost=int(head[form.NAMES_LOST_AT]),
        groups=_progress(head),
    )


def _progress(head: np.ndarray) -> dict[int, GroupProgress]:
    end = form.PROGRESS_OF_GROUPS_AT + form.NUM_PROGRESS_GROUPS * form.WORDS_PER_GROUP
    rows = head[form.PROGRESS_OF_GROUPS_AT : end].reshape(-1, form.WORDS_PER_GROUP)
    return {int(group): GroupProgress(int(begun), int(over)) for group, begun, over in rows if group}


def unpack_moment(word: int) -> tuple[int, Phase]:
    """Step and phase, as the header holds them."""
    number = word >> form.STEP_BITS
    return word & 0xFFFFFFFF, PHASES[number] if number < len(PHASES) else PHASES[0]
