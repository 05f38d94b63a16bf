"""The batch plan: which ranks process which piece of which sequence, in which micro-batch, in which order.

A plan is a pure function of (lengths, layout, cost model, speeds). It is serialised as JSON (``to_json``/``from_json``):
field names as below, tuples as arrays; readers refuse unknown fields and unknown format versions.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from evermesh.parallelism.errors import PlanInvalid

FORMAT_VERSION = 1
DIGEST_BYTES = 32
"""Of a batch digest, as ASCII."""
_STRICT: Any = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Piece:
    """One rank's part of one sequence."""

    __pydantic_config__ = _STRICT

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

    __pydantic_config__ = _STRICT

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


@dataclass(frozen=True, slots=True)
class Certificate:
    """How good a plan is, next to a bound that no plan can beat under the same cost model."""

    __pydantic_config__ = _STRICT

    makespan_s: float
    """Predicted time until the last rank has finished its micro-batches, seconds."""
    lower_bound_s: float
    binding: Literal["work", "longest sequence", "memory", "nothing"]
    """Which constraint gives the bound."""

    @property
    def ratio(self) -> float:
        """Makespan over bound, at least 1; 1 for an empty batch."""
        return self.makespan_s / self.lower_bound_s if self.lower_bound_s > 0 else 1.0


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The work of every HDP rank for one batch.

    ``ranks[r]`` is the ordered list of micro-batches of HDP rank r (possibly empty). Rings that share a rank appear in
    the same relative order on all their members, which is what keeps the joint order free of cycles.
    """

    __pydantic_config__ = _STRICT

    lengths: tuple[int, ...]
    """Tokens of every sequence of the batch."""
    capacity: int
    """Tokens that one rank holds in one micro-batch."""
    ranks: tuple[tuple[MicroBatch, ...], ...]
    certificate: Certificate
    planner: str
    """Name of the planner that made it."""
    cost_version: int
    speeds_version: int
    format_version: int = FORMAT_VERSION

    @property
    def num_tokens(self) -> int:
        """Tokens of the batch; the loss of every token is weighted by one over the number that count."""
        return sum(self.lengths)

    @property
    def fill(self) -> float:
        """Tokens over capacity of the micro-batches in use: 1 when every micro-batch is full."""
        slots = sum(len(micro_batches) for micro_batches in self.ranks) * self.capacity
        return self.num_tokens / slots if slots else 0.0

    def ring_sizes(self) -> dict[int, int]:
        """Number of sequences per ring size."""
        rings = {
            piece.sequence: len(piece.ring)
            for micro_batches in self.ranks
            for micro_batch in micro_batches
            for piece in micro_batch.pieces
        }
        return dict(sorted(Counter(rings.values()).items()))

    def to_json(self) -> bytes:
        """The plan as JSON."""
        return _adapter().dump_json(self)

    @classmethod
    def from_json(cls, payload: bytes | str) -> Self:
        """The plan that ``to_json`` wrote.

        Raises:
            PlanInvalid: the payload is not a plan of this format version.
        """
        try:
            plan = _adapter().validate_json(payload)
        except ValidationError as error:
            raise PlanInvalid(f"not a batch plan: {error.error_count()} errors, first: {error.errors()[0]}") from error
        if plan.format_version != FORMAT_VERSION:
            raise PlanInvalid(f"batch plan of format {plan.format_version}; this version reads {FORMAT_VERSION}.")
        return plan


@functools.cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(BatchPlan)


def batch_digest(identities: Iterable[str], lengths: Sequence[int]) -> str:
    """Digest of what is in a batch, by which ranks make sure that they plan and load the same one."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES // 2)
    for identity, length in zip(identities, lengths, strict=True):
        digest.update(f"{identity}:{length}\n".encode())
    return digest.hexdigest()
