"""Plans of other systems, as JSON.

    {"format": "evermesh-replay-1",
     "system": "name of what made it",
     "capacity": 8192,
     "ranks": [
       [{"pieces": [{"sequence": 0, "tokens": 4096, "ring": [0, 1]}, {"sequence": 7, "tokens": 100}],
         "recompute": false}],
       [{"pieces": [{"sequence": 0, "tokens": 4096, "ring": [0, 1]}]}]]}

``ranks`` has, for every rank, its micro-batches in order; ``tokens`` are those of the sequence that this rank holds; ``ring``
are the ranks that share it, in ring order (left out: this one alone). ``capacity`` (tokens of a rank in a micro-batch) may be
left out: then it is that of the fullest. Sequences are numbered from 0 without gaps. Costs take the members of a ring to
do equal parts of the attention, as any balanced cut gives them; so their tokens have to be nearly equal.
"""

from collections import defaultdict
from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError

from evermesh.parallelism.batch_plan import BatchPlan, Certificate, MicroBatch, Piece
from evermesh.parallelism.errors import PlanInvalid

_MOST_UNEVEN = 1.05
"""Most tokens of a member over its even share, and one token more."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Piece(_Strict):
    sequence: NonNegativeInt
    tokens: PositiveInt
    ring: tuple[NonNegativeInt, ...] | None = None


class _MicroBatch(_Strict):
    pieces: tuple[_Piece, ...]
    recompute: bool = False


class _Plan(_Strict):
    format: Literal["evermesh-replay-1"]
    system: str = "another system"
    capacity: PositiveInt | None = None
    ranks: tuple[tuple[_MicroBatch, ...], ...]


def read_foreign(payload: bytes | str) -> BatchPlan:
    """The plan in ``payload``, for replaying: which tokens a member of a ring holds is made up, only how many is read.

    Its certificate says nothing (0 seconds).

    Raises:
        PlanInvalid: the payload is not of the format, or a sequence is not whole; names the first thing that is wrong.
    """
    try:
        found = _Plan.model_validate_json(payload)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise PlanInvalid(f"not a plan to replay: {where or 'the file'}: {first['msg']}.") from error
    held = _held(found)
    lengths = _lengths(held)
    starts: dict[tuple[int, int], int] = {}
    for sequence, (ring, tokens) in held.items():
        start = 0
        for member in ring:
            starts[sequence, member] = start
            start += tokens[member]
    ranks = tuple(
        tuple(_micro_batch(micro_batch, rank, starts) for micro_batch in micro_batches)
        for rank, micro_batches in enumerate(found.ranks)
    )
    fullest = max((micro_batch.num_tokens for micro_batches in ranks for micro_batch in micro_batches), default=1)
    capacity = found.capacity or max(1, fullest)
    if fullest > capacity:
        raise PlanInvalid(
            f"a micro-batch has {fullest:,} tokens, but the capacity is {capacity:,}. Correct one of them."
        )
    return BatchPlan(lengths, capacity, ranks, Certificate(0.0, 0.0, "nothing"), found.system, 0, 0)


def _micro_batch(found: _MicroBatch, rank: int, starts: dict[tuple[int, int], int]) -> MicroBatch:
    pieces = tuple(
        Piece(
            piece.sequence,
            ((start := starts[piece.sequence, rank], start + piece.tokens),),
            (rank,) if piece.ring is None else piece.ring,
        )
        for piece in found.pieces
    )
    return MicroBatch(pieces, "block" if found.recompute else "none")


def _held(found: _Plan) -> dict[int, tuple[tuple[int, ...], dict[int, int]]]:
    """By sequence: its ring, and the tokens of every member."""
    rings: dict[int, tuple[int, ...]] = {}
    tokens: dict[int, dict[int, int]] = defaultdict(dict)
    for rank, micro_batches in enumerate(found.ranks):
        for piece in (piece for micro_batch in micro_batches for piece in micro_batch.pieces):
            ring = (rank,) if piece.ring is None else piece.ring
            if rings.setdefault(piece.sequence, ring) != ring or rank not in ring or len(set(ring)) < len(ring):
                raise PlanInvalid(
                    f"sequence {piece.sequence}: rank {rank} names the ring {ring[:8]}; all members name one."
                )
            if rank in tokens[piece.sequence]:
                raise PlanInvalid(f"sequence {piece.sequence} is on rank {rank} twice; a rank holds one piece of it.")
            tokens[piece.sequence][rank] = piece.tokens
    for sequence, ring in rings.items():
        missing = set(ring) - tokens[sequence].keys()
        if missing:
            raise PlanInvalid(f"sequence {sequence}: rank {min(missing)} is in its ring, but holds no piece of it.")
    return {sequence: (ring, tokens[sequence]) for sequence, ring in sorted(rings.items())}


def _lengths(held: dict[int, tuple[tuple[int, ...], dict[int, int]]]) -> tuple[int, ...]:
    if list(held) != list(range(len(held))):
        missing = next(number for number in range(len(held)) if number not in held)
        raise PlanInvalid(
            f"sequence {missing} is nowhere; number the sequences from 0 to {len(held) - 1} without gaps."
        )
    for sequence, (_, tokens) in held.items():
        share = sum(tokens.values()) / len(tokens)
        if max(tokens.values()) > _MOST_UNEVEN * share + 1:
            raise PlanInvalid(
                f"sequence {sequence}: a member holds {max(tokens.values()):,} tokens, its even share is {share:,.0f}. "
                "Costs of uneven cuts are not known here; give a plan that cuts evenly."
            )
    return tuple(sum(tokens.values()) for _, tokens in held.values())
