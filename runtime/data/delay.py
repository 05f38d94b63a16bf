"""Outliers wait for each other: very long sequences are trained some batches late, several of them in one batch.

The idea is WLB-LLM's outlier delay (OSDI 2025): queues by length, each emptied when it holds as many as are to be trained
together. A batch with one outlier has many ranks wait for it, or cuts it finely; a batch with several has one for every part
of the ranks. Added here are limits, so that a sequence is late by a number of steps that is known beforehand.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from evermesh.runtime.data.batch import SequenceRef
from evermesh.runtime.data.config import OutlierDelay
from evermesh.runtime.data.corpus import Corpus


class WaitingState(BaseModel):
    """A sequence that waits, as a checkpoint holds it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: NonNegativeInt
    document: NonNegativeInt
    start: NonNegativeInt
    stop: PositiveInt
    steps: NonNegativeInt
    """Batches made since it was drawn, without the one it was drawn for."""

    def error_in(self, corpora: Sequence[Corpus], context: int) -> str | None:
        """Why no sampler of these corpora can have drawn it; None: one can have."""
        length = self._document_length(corpora)
        if self.start < length and self.start % context == 0 and self.stop == min(self.start + context, length):
            return None
        return (
            f"[{self.start}:{self.stop}) of document {self.document} of source {self.source} waits, and is no sequence"
        )

    def sequence(self, corpora: Sequence[Corpus]) -> SequenceRef:
        """What waits."""
        return SequenceRef(self.source, self.document, self.start, self.stop, self._document_length(corpora))

    def _document_length(self, corpora: Sequence[Corpus]) -> int:
        """0 for a document that is not there."""
        known = self.source < len(corpora) and self.document < len(corpora[self.source])
        return int(corpora[self.source].lengths[self.document]) if known else 0


@dataclass(slots=True)
class _Waiting:
    sequence: SequenceRef
    steps: int = 0
    """Batches made since it was drawn, without the one it was drawn for."""


class DelayedSequences:
    """The outliers that wait, in the order in which they were drawn; without a ``policy`` none does.

    What waits fits into one batch, so that it can always be trained when it is due.
    """

    def __init__(self, policy: OutlierDelay | None, batch_tokens: int) -> None:
        self._policy, self._batch_tokens = policy, batch_tokens
        self._waiting: list[_Waiting] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def takes(self, sequence: SequenceRef) -> bool:
        """Whether ``sequence`` is an outlier, and there is room for it to wait."""
        return self._level(sequence) >= 0 and self._has_room(sequence.length)

    def put(self, sequence: SequenceRef) -> None:
        """Let ``sequence`` wait from the batch on that is being made."""
        self._waiting.append(_Waiting(sequence))

    def release(self, *, everything: bool = False) -> list[tuple[SequenceRef, int]]:
        """What a batch begins with, and how many steps late each is; to be called once for every batch.

        All of a level leave when enough of it wait, or when one of them is due; all of the level with most tokens when
        nothing else could begin to wait; and everything where asked, or where nothing is to wait any more. That fits into
        a batch, unless a run goes on with smaller ones than before: then one batch is larger, and nothing is later.
        """
        for waiting in self._waiting:
            waiting.steps += 1
        ripe = self._ripe_levels()
        leave = [everything or self._level(waiting.sequence) in ripe for waiting in self._waiting]
        released = [waiting for waiting, leaves in zip(self._waiting, leave, strict=True) if leaves]
        self._waiting = [waiting for waiting, leaves in zip(self._waiting, leave, strict=True) if not leaves]
        return [(waiting.sequence, waiting.steps) for waiting in released]

    def state(self) -> tuple[WaitingState, ...]:
        """What waits, for a checkpoint."""
        return tuple(
            WaitingState(
                source=waiting.sequence.source,
                document=waiting.sequence.document,
                start=waiting.sequence.start,
                stop=waiting.sequence.stop,
                steps=waiting.steps,
            )
            for waiting in self._waiting
        )

    def restore(self, state: Iterable[WaitingState], corpora: Sequence[Corpus]) -> None:
        """Let wait what waited, whatever the policy was then."""
        self._waiting = [_Waiting(saved.sequence(corpora), saved.steps) for saved in state]

    def _level(self, sequence: SequenceRef) -> int:
        """-1: it is no outlier."""
        return bisect_right(self._policy.thresholds, sequence.length) - 1 if self._policy is not None else -1

    def _has_room(self, tokens: int) -> bool:
        if self._policy is None or len(self._waiting) >= self._policy.most_waiting:
            return False
        return sum(waiting.sequence.length for waiting in self._waiting) + tokens <= self._batch_tokens

    def _ripe_levels(self) -> set[int]:
        """The levels of which all are to be trained now."""
        ripe = {-1}
        if self._policy is None:
            return ripe
        count, tokens = Counter[int](), Counter[int]()
        for waiting in self._waiting:
            level = self._level(waiting.sequence)
            count[level] += 1
            tokens[level] += waiting.sequence.length
            if waiting.steps >= self._policy.most_steps:
                ripe.add(level)
        ripe |= {level for level in count if count[level] >= self._policy.together}
        if not ripe & count.keys() and not self._has_room(self._policy.thresholds[0]):
            ripe.add(max(sorted(tokens), key=lambda level: tokens[level]))
        return ripe
