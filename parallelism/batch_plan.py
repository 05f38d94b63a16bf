"""The batch plan: which ranks process which piece of which sequence, in which micro-batch, in which order.

A plan is a pure function of (lengths, layout, cost model, speeds). It is serialised as JSON (``to_document``, and with packed
columns ``to_json``): field names as below, tuples as arrays; readers refuse unknown fields and unknown format versions.
"""

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import TypeAdapter, ValidationError

from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.rank_work import STRICT, MicroBatch, PackedRanks, Piece

FORMAT_VERSION = 3
DIGEST_BYTES = 32
"""Of a batch digest, as ASCII."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """How good a plan is, next to a bound that no plan can beat under the same cost model."""

    __pydantic_config__ = STRICT

    makespan_s: float
    """Predicted time until the last rank has finished its micro-batches, seconds."""
    lower_bound_s: float
    binding: Literal[
        "work", "longest sequence", "memory", "communication", "long sequences in turn", "pipeline", "nothing"
    ]
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

    __pydantic_config__ = STRICT

    lengths: tuple[int, ...]
    """Tokens of every sequence of the batch."""
    capacity: int
    """Tokens that one rank holds in one micro-batch."""
    ranks: Sequence[tuple[MicroBatch, ...]]
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
        """The plan as compact JSON, some bytes for each piece, for the ranks of a job: ``packed`` in place of ``ranks``.

        Raises:
            PlanInvalid: a ring is not cut as ``share_of`` cuts it.
        """
        packed = self.ranks if isinstance(self.ranks, PackedRanks) else PackedRanks.of(self.ranks, self.lengths)
        document = _adapter().dump_python(dataclasses.replace(self, ranks=()))
        del document["ranks"]
        return json.dumps({**document, "packed": packed.columns()}, separators=(",", ":")).encode()

    def to_document(self) -> bytes:
        """The plan as explicit JSON for other programs: every piece with its token ranges and its ring."""
        return _adapter().dump_json(dataclasses.replace(self, ranks=tuple(self.ranks)))

    @classmethod
    def from_json(cls, payload: bytes | str) -> Self:
        """The plan that ``to_json`` or ``to_document`` wrote.

        Raises:
            PlanInvalid: the payload is not a plan of this format version.
        """
        try:
            document = json.loads(payload)
            packed = document.pop("packed", None) if isinstance(document, dict) else None
            plan: Self = _adapter().validate_json(json.dumps(document if packed is None else {**document, "ranks": []}))
        except ValidationError as error:
            raise PlanInvalid(f"not a batch plan: {error.error_count()} errors, first: {error.errors()[0]}") from error
        except ValueError as error:
            raise PlanInvalid(f"not a batch plan: {error}") from error
        if plan.format_version != FORMAT_VERSION:
            raise PlanInvalid(f"batch plan of format {plan.format_version}; this version reads {FORMAT_VERSION}.")
        if packed is None:
            return dataclasses.replace(plan, ranks=tuple(plan.ranks))
        return dataclasses.replace(plan, ranks=PackedRanks.from_columns(packed, plan.lengths))


@functools.cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(BatchPlan)


def batch_digest(identities: Iterable[str], lengths: Sequence[int]) -> str:
    """Digest of what is in a batch, by which ranks make sure that they plan and load the same one."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES // 2)
    for identity, length in zip(identities, lengths, strict=True):
        digest.update(f"{identity}:{length}\n".encode())
    return digest.hexdigest()


__all__ = [
    "DIGEST_BYTES",
    "FORMAT_VERSION",
    "BatchPlan",
    "Certificate",
    "MicroBatch",
    "PackedRanks",
    "Piece",
    "batch_digest",
]
