"""The record: one collective or point-to-point message of one rank, 64 bytes.

A record lies in the ring of its rank (shared memory, little-endian), in arrays of :data:`RECORD` when many ranks are
analysed, and as a JSON line in the documented form of recorded rings. Strings are kept once, in the names of the ring:
a record holds their index.

``number`` is what matches records of different ranks: the n-th collective of a group on one rank is the n-th of that
group on every rank, and the n-th message from a to b in a group is the n-th that b receives from a.
"""

from dataclasses import dataclass
from enum import IntFlag
from typing import Any, get_args

import numpy as np

from evermesh.parallelism.collectives import Phase

RECORD = np.dtype(
    [
        ("sequence", "<u8"),
        ("entered_ns", "<u8"),
        ("enqueued_ns", "<u8"),
        ("ended_ns", "<u8"),
        ("num_bytes", "<u8"),
        ("group", "<u4"),
        ("number", "<u4"),
        ("step", "<u4"),
        ("site", "<u4"),
        ("peer", "<i4"),
        ("operation", "u1"),
        ("dtype", "u1"),
        ("phase", "u1"),
        ("flags", "u1"),
    ]
)
"""``sequence``: of the record on its rank, from 1, and the last field that is written: 0 or another than expected means
that the slot is being written. ``entered_ns``: monotonic clock of the node when the call began. ``enqueued_ns``: when the
backend had taken it; 0: not yet. ``ended_ns``: when it was complete; 0: it is not, or nobody sees its end (see
:class:`Flags`). ``num_bytes``: of the local buffer. ``group``, ``site``: index in the names. ``number``: of the collective
in its group on this rank, from 0, or of the message among those of its group, peer and direction. ``peer``: rank in the
group of the other side of a message or of the root of a rooted collective; -1: none."""
assert RECORD.itemsize == 64

NO_PEER = -1

OPERATIONS = (
    "unknown",
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "barrier",
    "send",
    "receive",
    "receive_any",
)
"""What ``operation`` counts. Those of one kind whose names differ (into a tensor, coalesced) are one."""

DTYPES = (
    "none",
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "complex128",
    "other",
)
"""What ``dtype`` counts."""

PHASES: tuple[Phase, ...] = get_args(Phase)
"""What ``phase`` counts."""

COLLECTIVES = frozenset(OPERATIONS[1:10])
TWO_SIDED = frozenset({"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "barrier"})
"""Collectives that no rank can leave before every rank has entered (with more than zero bytes): their stamps bound the
difference of two clocks from both sides."""


class Flags(IntFlag):
    """What is known of a record."""

    END_SEEN = 1
    """The end will be stamped when it comes; without it an ``ended_ns`` of 0 says nothing."""
    BLOCKING = 2
    """The caller waits inside the call."""
    DEVICE_TIMES = 4
    """``enqueued_ns`` and ``ended_ns`` come from events of the device; else from the host, which on a GPU is no time of
    the device."""
    FAILED = 8
    """It ended with an error."""


@dataclass(frozen=True, slots=True)
class Group:
    """A process group, as names of a ring describe it."""

    name: str
    """As torch calls it; the same on all its ranks."""
    ranks: tuple[int, ...]
    """Global ranks in the order of the group."""
    axis: str = ""
    """Mesh axis, or the description that its maker gave."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {"name": self.name, "ranks": list(self.ranks), "axis": self.axis}
