"""What the HDP ranks do in a batch plan: micro-batches of pieces of sequences, as objects and as packed columns."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict

from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.pieces import share_of

STRICT: Any = ConfigDict(extra="forbid")
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Piece:
    """One rank's part of one sequence."""

    __pydantic_config__ = STRICT

    sequence: int
    """Index of the sequence in the batch."""
    ranges: tuple[tuple[int, int], ...]
    """Token ranges [start, stop) of the sequence that this rank holds, ascending, none of them empty."""
    ring: tuple[int, ...]
    """HDP ranks that share the sequence, in ring order; one rank when the sequence is whole."""
    heads: int = 1
    """So many consecutive members of the ring divide the heads of attention among them; see ``Sharing.heads``."""
    gathers: bool = False
    """Whether keys and values are gathered at once instead of passed around."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence that this rank holds."""
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one HDP rank runs forward and backward at once; without pieces it is a zero-token step."""

    __pydantic_config__ = STRICT

    pieces: tuple[Piece, ...]
    recompute: Literal["none", "block"] = "none"
    """Whether every block keeps all its activations, or does with them as ``Layout.activations`` says."""
    offload: float = 0.0
    """Of blocks that offload: fraction of the tokens whose matrix products wait in host memory."""
    lock_step: int | None = None
    """Index of the collectives (expert all-to-all, sharded parameters) that a group runs together; None: none."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all pieces."""
        return sum(piece.num_tokens for piece in self.pieces)


Assignment = tuple[tuple[MicroBatch, ...], ...]
"""The micro-batches of every HDP rank, in their order."""


@dataclass(frozen=True, eq=False)
class PackedRanks(Sequence[tuple[MicroBatch, ...]]):
    """The micro-batches of every rank in a few columns of numbers; a rank's objects are made when it is asked for.

    The objects of plans for thousands of ranks would need a hundred times the memory. Rings are cut by ``share_of``.
    """

    lengths: Integers
    """Tokens of every sequence, [N]."""
    rank_start: Integers
    """Where the micro-batches of every rank begin, and their number, [R + 1]."""
    micro_batch_start: Integers
    """Where the pieces of every micro-batch begin, and their number, [M + 1]."""
    sequence: Integers
    """Of every piece, [P]."""
    ring_start: Integers
    """Where the ring of every sequence begins, and the number of all members, [N + 1]."""
    ring: Integers
    """Members of all rings, each in ring order, [P]."""
    heads: Integers
    """Of every sequence, see ``Piece``, [N]."""
    gathers: NDArray[np.bool_]
    """Of every sequence, [N]."""
    recomputed: NDArray[np.bool_]
    """Of every micro-batch: ``recompute`` is "block", [M]."""
    offload: NDArray[np.float64]
    """Of every micro-batch that is recomputed, [M]."""
    lock_step: Integers | None = None
    """Of every micro-batch, [M]; None: there are none."""

    def __len__(self) -> int:
        return len(self.rank_start) - 1

    @overload
    def __getitem__(self, rank: int) -> tuple[MicroBatch, ...]: ...
    @overload
    def __getitem__(self, rank: slice) -> tuple[tuple[MicroBatch, ...], ...]: ...
    def __getitem__(self, rank: int | slice) -> tuple[MicroBatch, ...] | tuple[tuple[MicroBatch, ...], ...]:
        if isinstance(rank, slice):
            return tuple(self[index] for index in range(len(self))[rank])
        rank = range(len(self))[rank]
        return tuple(self.micro_batch(rank, index) for index in range(self.rank_start[rank], self.rank_start[rank + 1]))

    def __iter__(self) -> Iterator[tuple[MicroBatch, ...]]:
        return (self[rank] for rank in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, PackedRanks):
            return self.columns() == other.columns() and np.array_equal(self.lengths, other.lengths)
        return isinstance(other, tuple) and tuple(self) == other

    def __hash__(self) -> int:
        return hash((len(self), self.sequence.tobytes()))

    def micro_batch(self, rank: int, index: int) -> MicroBatch:
        """Number ``index`` of all micro-batches, which is one of ``rank``."""
        start, stop = self.micro_batch_start[index : index + 2]
        recomputed = bool(self.recomputed[index])
        return MicroBatch(
            pieces=tuple(self._piece(rank, int(sequence)) for sequence in self.sequence[start:stop]),
            recompute="block" if recomputed else "none",
            offload=float(self.offload[index]) if recomputed else 0.0,
            lock_step=None if self.lock_step is None else int(self.lock_step[index]),
        )

    def _piece(self, rank: int, sequence: int) -> Piece:
        length, ring = int(self.lengths[sequence]), self._ring(sequence)
        ranges = ((0, length),) if len(ring) == 1 else share_of(length, len(ring), ring.index(rank)).ranges()
        return Piece(sequence, ranges, ring, int(self.heads[sequence]), bool(self.gathers[sequence]))

    @functools.lru_cache(maxsize=4096)  # noqa: B019  rings are asked for by every member in turn; plans are few
    def _ring(self, sequence: int) -> tuple[int, ...]:
        return tuple(self.ring[self.ring_start[sequence] : self.ring_start[sequence + 1]].tolist())

    def columns(self) -> dict[str, Any]:
        """As lists of numbers; without ``lengths``, which the plan has.

        ``heads`` and ``gathers`` are of rings only, ``offload`` of what is recomputed: none where nothing waits on the host.
        """
        rings = np.flatnonzero(np.diff(self.ring_start) > 1)
        return {
            "rank_start": self.rank_start.tolist(),
            "micro_batch_start": self.micro_batch_start.tolist(),
            "sequence": self.sequence.tolist(),
            "ring_size": np.diff(self.ring_start).tolist(),
            "ring": self.ring.tolist(),
            "heads": [[i, int(self.heads[i])] for i in rings.tolist() if self.heads[i] > 1],
            "gathers": [i for i in rings.tolist() if self.gathers[i]],
            "recomputed": np.flatnonzero(self.recomputed).tolist(),
            "offload": self.offload[self.recomputed].tolist() if self.offload[self.recomputed].any() else [],
            "lock_step": None if self.lock_step is None else self.lock_step.tolist(),
        }

    @classmethod
    def from_columns(cls, columns: dict[str, Any], lengths: Sequence[int]) -> Self:
        """What ``columns`` gave.

        Raises:
            PlanInvalid: they do not fit together.
        """
        try:
            micro_batches = len(columns["micro_batch_start"]) - 1
            heads, gathers = np.ones(len(lengths), np.int64), np.zeros(len(lengths), np.bool_)
            recomputed = np.zeros(micro_batches, np.bool_)
            for sequence, number in columns["heads"]:
                heads[sequence] = number
            gathers[columns["gathers"]] = True
            recomputed[columns["recomputed"]] = True
            offload = np.zeros(micro_batches)
            if columns["offload"]:
                offload[recomputed] = np.asarray(columns["offload"], np.float64)
            lock_step = columns["lock_step"]
            packed = cls(
                lengths=np.asarray(lengths, np.int64),
                rank_start=np.asarray(columns["rank_start"], np.int64),
                micro_batch_start=np.asarray(columns["micro_batch_start"], np.int64),
                sequence=np.asarray(columns["sequence"], np.int64),
                ring_start=_starts(columns["ring_size"]),
                ring=np.asarray(columns["ring"], np.int64),
                heads=heads,
                gathers=gathers,
                recomputed=recomputed,
                offload=offload,
                lock_step=None if lock_step is None else np.asarray(lock_step, np.int64),
            )
            packed._check()
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise PlanInvalid(f"not the columns of a batch plan: {error!r}") from error
        return packed

    def _check(self) -> None:
        """Raise ``ValueError`` unless every index points at something, and every piece is of a member of its ring."""
        for starts, total in (
            (self.rank_start, len(self.micro_batch_start) - 1),
            (self.micro_batch_start, len(self.sequence)),
            (self.ring_start, len(self.ring)),
        ):
            if starts[0] != 0 or starts[-1] != total or (np.diff(starts) < 0).any():
                raise ValueError("where the parts of a column start does not ascend from 0 to its length")
        if len(self.ring_start) != len(self.lengths) + 1:
            raise ValueError(f"{len(self.ring_start) - 1} rings for {len(self.lengths)} sequences")
        if self.lock_step is not None and len(self.lock_step) != len(self.recomputed):
            raise ValueError(f"{len(self.lock_step)} lock-steps for {len(self.recomputed)} micro-batches")
        if len(self.sequence) and not 0 <= self.sequence.min() <= self.sequence.max() < len(self.lengths):
            raise ValueError("a piece of a sequence that the batch does not have")
        held = np.repeat(np.repeat(np.arange(len(self)), np.diff(self.rank_start)), np.diff(self.micro_batch_start))
        members = np.repeat(np.arange(len(self.lengths)), np.diff(self.ring_start))
        if not np.array_equal(np.unique(self.sequence * len(self) + held), np.unique(members * len(self) + self.ring)):
            raise ValueError("the members of a ring are not the ranks that hold the pieces")

    @classmethod
    def of(cls, ranks: Sequence[Sequence[MicroBatch]], lengths: Sequence[int]) -> Self:
        """The packed form of objects.

        Raises:
            PlanInvalid: a ring is not cut as ``share_of`` cuts it, or its pieces do not agree.
        """
        micro_batches = [micro_batch for of_rank in ranks for micro_batch in of_rank]
        pieces = [piece for micro_batch in micro_batches for piece in micro_batch.pieces]
        by_sequence = {piece.sequence: piece for piece in pieces}
        rings = [by_sequence[sequence].ring if sequence in by_sequence else () for sequence in range(len(lengths))]
        steps = [micro_batch.lock_step for micro_batch in micro_batches]
        packed = cls(
            lengths=np.asarray(lengths, np.int64),
            rank_start=_starts([len(of_rank) for of_rank in ranks]),
            micro_batch_start=_starts([len(micro_batch.pieces) for micro_batch in micro_batches]),
            sequence=np.asarray([piece.sequence for piece in pieces], np.int64),
            ring_start=_starts([len(ring) for ring in rings]),
            ring=np.asarray([rank for ring in rings for rank in ring], np.int64),
            heads=np.asarray([by_sequence[s].heads if s in by_sequence else 1 for s in range(len(lengths))], np.int64),
            gathers=np.asarray([s in by_sequence and by_sequence[s].gathers for s in range(len(lengths))], np.bool_),
            recomputed=np.asarray([micro_batch.recompute == "block" for micro_batch in micro_batches], np.bool_),
            offload=np.asarray([micro_batch.offload for micro_batch in micro_batches], np.float64),
            lock_step=None if None in steps or not steps else np.asarray(steps, np.int64),
        )
        if tuple(packed) != tuple(tuple(of_rank) for of_rank in ranks):
            raise PlanInvalid("the plan cannot be packed: its rings are not cut as share_of cuts them, or disagree.")
        return packed


def _starts(sizes: Sequence[int]) -> Integers:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(sizes, np.int64))])
