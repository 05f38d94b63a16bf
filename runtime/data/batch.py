"""What a batch is made of: tokens of documents, and how late they are."""

import functools
from dataclasses import dataclass

from evermesh.parallelism.batch_plan import batch_digest


@dataclass(frozen=True, slots=True)
class SequenceRef:
    """Tokens [start, stop) of a document: what a batch is made of."""

    source: int
    """Index of the source in the configuration."""
    document: int
    start: int
    stop: int
    document_length: int
    """Tokens of the whole document."""

    @property
    def length(self) -> int:
        """Tokens of the sequence."""
        return self.stop - self.start

    @property
    def identity(self) -> str:
        """A stable name, such as ``0/17[0:8192)``."""
        return f"{self.source}/{self.document}[{self.start}:{self.stop})"

    @property
    def is_split(self) -> bool:
        """True for a part of a document longer than the context."""
        return self.length < self.document_length


@dataclass(frozen=True)
class Batch:
    """The sequences of one optimizer step, in the order they were drawn."""

    sequences: tuple[SequenceRef, ...]
    steps_late: tuple[int, ...] = ()
    """How many batches ago every sequence was drawn; empty: all of them just now."""
    num_waiting: int = 0
    """Sequences that were drawn, and are left for later batches."""
    num_again: int = 0
    """Of the sequences the first so many, which were in a step that was skipped, and are tried again."""

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of every sequence."""
        return tuple(sequence.length for sequence in self.sequences)

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(self.lengths)

    @property
    def num_split(self) -> int:
        """Sequences that are parts of a document longer than the context."""
        return sum(sequence.is_split for sequence in self.sequences)

    @property
    def most_steps_late(self) -> int:
        """Steps that the sequence which waited longest is late."""
        return max(self.steps_late, default=0)

    @property
    def mean_steps_late(self) -> float:
        """Steps that a token of the batch is late on average."""
        late = sum(steps * tokens for steps, tokens in zip(self.steps_late, self.lengths, strict=False))
        return late / self.num_tokens if late else 0.0

    @functools.cached_property
    def digest(self) -> str:
        """Digest of identities and lengths, by which ranks make sure that they have the same batch."""
        return batch_digest((sequence.identity for sequence in self.sequences), self.lengths)
