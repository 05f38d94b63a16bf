"""What agents and controller say to each other about the records of ranks; imports no numpy.

Arrays are little-endian, in base64. See ``packing`` for what they hold; nothing is believed before it is unpacked there.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.dataclasses import dataclass

from evermesh.fault.process_state import ProcessState
from evermesh.fault.recorder.ring_format import NUM_SLOTS, RECORD_BYTES
from evermesh.parallelism.collectives import Phase

MOST_GROUPS = 4096
"""Of a rank."""
MOST_RANKS = 1 << 20
MOST_SAMPLES = 64
"""Of a rank in a window."""
SLOT_WORDS = 6
"""That a summary has of each group."""
MOST_ENDS = 4096
"""Connections of a rank that are told."""
_WORD = 8
_COUNT = Annotated[int, Field(ge=0, lt=1 << 63)]
_RANK = Annotated[int, Field(ge=0, lt=MOST_RANKS)]
_END = Annotated[str, Field(max_length=96)]
_NAME = Annotated[str, Field(max_length=1024)]


_WIRE = ConfigDict(extra="forbid", ser_json_inf_nan="constants", ser_json_bytes="base64", val_json_bytes="base64")


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, **_WIRE)


class PackedGroup(_Message):
    """A process group as a rank calls it."""

    index: Annotated[int, Field(ge=0, lt=MOST_GROUPS)]
    name: _NAME
    ranks: Annotated[tuple[tuple[int, int, int], ...], Field(max_length=MOST_RANKS)]
    """As ranges: start, stop, step."""
    axis: _NAME


@dataclass(frozen=True, slots=True, kw_only=True, config=_WIRE)
class PackedTrace:  # there are as many as ranks: a model takes several times the memory
    """Records of a rank, oldest first, and where it stands."""

    rank: _RANK
    pid: _COUNT
    step: _COUNT
    phase: Phase
    read_ns: _COUNT
    wall_offset_ns: int
    records: Annotated[bytes, Field(max_length=NUM_SLOTS * RECORD_BYTES)]
    process: ProcessState | None
    """None: it does not run."""


@dataclass(frozen=True, slots=True, kw_only=True, config=_WIRE)
class PackedSummary:
    """What a rank did in a window."""

    tail: PackedTrace
    groups: Annotated[tuple[PackedGroup, ...], Field(max_length=MOST_GROUPS)] | None
    """All groups of the rank; None: those that it said last."""
    opened: Annotated[int, Field(ge=-1)]
    first_step: _COUNT
    of_slot: Annotated[bytes, Field(max_length=MOST_GROUPS * SLOT_WORDS * _WORD)]
    of_step: Annotated[bytes, Field(max_length=1 << 16)]
    signatures: Annotated[bytes, Field(max_length=1 << 12)]
    digests: Annotated[bytes, Field(max_length=1 << 17)]
    num_records: _COUNT
    num_lost: _COUNT
    samples: Annotated[bytes, Field(max_length=MOST_SAMPLES * RECORD_BYTES)]
    """Some of the new records, whole; see ``fault.detectors.sampling``."""
    starved: Annotated[float, Field(ge=0, le=1)]
    """Share of the last second in which the process waited for a processor that others had."""


class Window(_Message):
    """What the ranks of a node did since the last one. Every agent whose ranks record sends one at a time."""

    kind: Literal["window"] = "window"
    generation: int
    summaries: tuple[PackedSummary, ...]


class RingPart(_Message):
    """The newest records of one rank, as they were asked for."""

    kind: Literal["ring"] = "ring"
    generation: int
    trace: PackedTrace


class Held(_Message):
    """A connection on which something waits to be acknowledged; see ``fault.connections``."""

    local: _END
    remote: _END
    waiting_bytes: _COUNT
    resent: _COUNT
    segment_bytes: _COUNT


class Connections(_Message):
    """How the TCP connections of the ranks of a node do, every now and then."""

    kind: Literal["connections"] = "connections"
    generation: int
    host: Annotated[str, Field(max_length=128)]
    """What knows by itself what its own addresses, such as 127.0.0.1, mean; the same for all nodes on it."""
    ends: dict[_RANK, Annotated[tuple[tuple[_END, _END], ...], Field(max_length=MOST_ENDS)]] | None
    """By rank, of all connections: address and port here and there; None: as they were said last."""
    held: dict[_RANK, Annotated[tuple[Held, ...], Field(max_length=MOST_ENDS)]]


class PlannedStep(_Message):
    """What the batch plan of a step gives every HDP rank."""

    alone_s: Annotated[tuple[float, ...], Field(max_length=MOST_RANKS)]
    """Seconds that it computes by the cost model, without waiting, in micro-batches that it shares with nobody."""
    in_rings_s: Annotated[tuple[float, ...], Field(max_length=MOST_RANKS)]
    """In the others, where it communicates meanwhile."""
    tokens: Annotated[tuple[int, ...], Field(max_length=MOST_RANKS)]
    micro_batches: Annotated[tuple[int, ...], Field(max_length=MOST_RANKS)]
    rings: Annotated[tuple[int, ...], Field(max_length=MOST_RANKS)]
    """Micro-batches that it shares."""
    makespan_s: float
    """Predicted time until the last one has finished."""

    @property
    def columns(self) -> tuple[tuple[float, ...], ...]:
        """All that is said of every HDP rank."""
        return (self.alone_s, self.in_rings_s, self.tokens, self.micro_batches, self.rings)


class PlannedWork(_Message):
    """What the batch plans of some steps expect, said when they begin."""

    kind: Literal["work"] = "work"
    generation: int
    pp: Annotated[int, Field(ge=1, lt=MOST_RANKS)]
    tp: Annotated[int, Field(ge=1, lt=MOST_RANKS)]
    steps: Annotated[dict[_COUNT, PlannedStep], Field(max_length=64)]


class ReadRings(_Message):
    """Send the newest records of these ranks, as far as they are yours."""

    kind: Literal["read_rings"] = "read_rings"
    generation: int
    ranks: tuple[int, ...]
    records: int
    """At most so many of each."""
