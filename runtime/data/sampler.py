"""The order in which a run sees its data: the same on any number of ranks, and exact after every resume.

Documents longer than the context are split into consecutive sequences. Every source walks through a permutation of its
sequences per epoch; a mixture takes the next sequence from the source that is furthest behind its share of tokens. Sequences
are drawn in that order whether or not some of them then wait (``evermesh.runtime.data.delay``).
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from evermesh.runtime.data.batch import Batch, SequenceRef
from evermesh.runtime.data.config import DataConfig
from evermesh.runtime.data.corpus import Corpus
from evermesh.runtime.data.delay import DelayedSequences, WaitingState
from evermesh.runtime.data.errors import OutOfRange, SamplerMismatch

_WINDOW = 4096
_STATE_VERSION = 1


class SourceState(BaseModel):
    """Where one source stands, and which corpus and weight that is true for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: str
    """Name, for messages only."""
    digest: str
    tokens: int
    share: float
    """Weight over the sum of weights."""
    epoch: NonNegativeInt
    position: NonNegativeInt
    """Sequences drawn in this epoch."""
    drawn: NonNegativeInt
    """Tokens drawn in all epochs."""
    held_out: NonNegativeInt = 0
    """Documents that are never drawn."""


class SamplerState(BaseModel):
    """The state of a sampler; its size does not depend on the corpora, only on how much waits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = _STATE_VERSION
    seed: int
    context: int
    sources: tuple[SourceState, ...]
    waiting: tuple[WaitingState, ...] = ()
    """Drawn, and not yet trained; in the order drawn."""


class Sampler:
    """Yields batches without end; every sequence of a source is drawn once per epoch of that source."""

    def __init__(
        self,
        corpora: Sequence[Corpus],
        config: DataConfig,
        seed: int,
        held_out: Sequence[NDArray[np.int64]] | None = None,
    ) -> None:
        """Start before the first batch; ``corpora[i]`` is the corpus of ``config.sources[i]``, and ``held_out[i]`` are
        the documents of it that are never drawn (by default none)."""
        held_out = held_out or [np.empty(0, np.int64)] * len(corpora)
        total = sum(source.weight for source in config.sources)
        self.seed, self._context, self._batch_tokens = seed, config.context, config.batch_tokens
        self._corpora, self._delayed = corpora, DelayedSequences(config.outlier_delay, config.batch_tokens)
        self._streams = [
            _Stream(corpus, number, source.weight / total, config.context, seed, documents)
            for number, (corpus, source, documents) in enumerate(zip(corpora, config.sources, held_out, strict=True))
        ]
        self._drawn = 0

    def next_batch(self, *, ends: bool = False, again: Sequence[SequenceRef] = ()) -> Batch:
        """The next batch: what is tried ``again``, what has waited long enough, and fresh sequences up to ``batch_tokens``,
        at least one in all.

        The sequence that does not fit any more is the first of the batch after it. Nothing waits beyond a batch that
        ``ends`` the run.
        """
        chosen = [*((sequence, 0) for sequence in again), *self._delayed.release(everything=ends)]
        room = self._batch_tokens - sum(sequence.length for sequence, _ in chosen)
        while True:
            stream = max(self._streams, key=self._deficit)  # of equals the first
            sequence = stream.peek()
            waits = not ends and self._delayed.takes(sequence)
            if chosen and not waits and sequence.length > room:
                sequences, steps_late = zip(*chosen, strict=True)
                return Batch(sequences, steps_late, len(self._delayed), len(again))
            stream.advance(sequence.length)
            self._drawn += sequence.length
            if waits:
                self._delayed.put(sequence)
                continue
            chosen.append((sequence, 0))
            room -= sequence.length

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values; a sampler that loads it yields the same batches as this one from here on."""
        sources = tuple(stream.state() for stream in self._streams)
        state = SamplerState(seed=self.seed, context=self._context, sources=sources, waiting=self._delayed.state())
        return state.model_dump(mode="json")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. The tokens per batch and which sequences wait may differ: the order in which sequences are
        drawn does not depend on them.

        Raises:
            SamplerMismatch: the state belongs to another seed, context, mixture or corpus. The sampler is unchanged.
        """
        try:
            saved = SamplerState.model_validate(state)
        except ValidationError as error:
            raise SamplerMismatch(
                f"not the state of a sampler: {error.error_count()} errors, first: {error.errors()[0]}"
            ) from error
        if differences := self._differences(saved):
            raise SamplerMismatch(
                f"the state belongs to other data: {'; '.join(differences)}. Use the data configuration and seed of "
                f"the run that is resumed, or start a new run."
            )
        for stream, source in zip(self._streams, saved.sources, strict=True):
            stream.seek(source.epoch, source.position, source.drawn)
        self._drawn = sum(source.drawn for source in saved.sources)
        self._delayed.restore(saved.waiting, self._corpora)

    def _deficit(self, stream: "_Stream") -> float:
        return stream.share * self._drawn - stream.drawn

    def _differences(self, saved: SamplerState) -> list[str]:
        own = SamplerState.model_validate(self.state_dict())
        found = _compare("", own, saved, ("format_version", "seed", "context"))
        if len(own.sources) != len(saved.sources):
            return [*found, f"{len(own.sources)} sources here, {len(saved.sources)} in the state"]
        for number, (mine, theirs) in enumerate(zip(own.sources, saved.sources, strict=True)):
            place = f"source {number} ({theirs.corpus} in the state, {mine.corpus} here): "
            found += _compare(place, mine, theirs, ("tokens", "digest", "share", "held_out"))
            if theirs.position >= self._streams[number].num_sequences:
                found.append(f"{place}position {theirs.position} of {self._streams[number].num_sequences} sequences")
        wrong = (waiting.error_in(self._corpora, self._context) for waiting in saved.waiting)
        return found + [error for error in wrong if error is not None]


class _Stream:
    """The endless order of the sequences of one source."""

    def __init__(
        self, corpus: Corpus, source: int, share: float, context: int, seed: int, held_out: NDArray[np.int64]
    ) -> None:
        self.share, self.drawn = share, 0
        self._corpus, self._source, self._context, self._seed = corpus, source, context, seed
        self._lengths = corpus.lengths
        self._num_held_out = len(held_out)
        drawn_lengths = self._lengths.copy()
        drawn_lengths[held_out] = 0  # a document without sequences
        self._first = first_sequences(drawn_lengths, context)
        self.num_sequences = int(self._first[-1])
        self.seek(0, 0, 0)

    def seek(self, epoch: int, position: int, drawn: int) -> None:
        """Stand before the sequence at ``position`` of ``epoch``, with ``drawn`` tokens behind."""
        self._epoch, self._position, self.drawn = epoch, position, drawn
        self._order = sequence_order(self._seed, self._source, epoch, self.num_sequences)
        self._read_ahead()

    def peek(self) -> SequenceRef:
        """The next sequence."""
        return self._window[self._position - self._window_start]

    def advance(self, tokens: int) -> None:
        """Step over the next sequence, which has ``tokens`` tokens."""
        self.drawn += tokens
        self._position += 1
        if self._position == self.num_sequences:
            self.seek(self._epoch + 1, 0, self.drawn)
        elif self._position == self._window_start + len(self._window):
            self._read_ahead()

    def state(self) -> SourceState:
        return SourceState(
            corpus=self._corpus.name,
            digest=self._corpus.digest,
            tokens=self._corpus.num_tokens,
            share=self.share,
            epoch=self._epoch,
            position=self._position,
            drawn=self.drawn,
            held_out=self._num_held_out,
        )

    def _read_ahead(self) -> None:
        """Look up the next sequences together, which costs a fraction of doing it one by one."""
        self._window_start = self._position
        numbers = self._order[self._position : self._position + _WINDOW]
        documents = np.searchsorted(self._first, numbers, side="right") - 1
        starts = (numbers - self._first[documents]) * self._context
        lengths = self._lengths[documents]
        stops = np.minimum(starts + self._context, lengths)
        rows = zip(documents.tolist(), starts.tolist(), stops.tolist(), lengths.tolist(), strict=True)
        self._window = [SequenceRef(self._source, *row) for row in rows]


def first_sequences(lengths: NDArray[np.int64], context: int) -> NDArray[np.int64]:
    """Number of every document's first sequence, and last the number of all sequences; shape (documents + 1,)."""
    return np.concatenate([np.zeros(1, np.int64), -(-lengths // context)]).cumsum()


def sequence_order(seed: int, source: int, epoch: int, num_sequences: int) -> NDArray[np.int64]:
    """The permutation of a source's sequences in an epoch, shape (num_sequences,).

    Sorting raw Philox output depends only on the generator's definition (Salmon et al. 2011), while
    ``Generator.permutation`` may change between numpy versions, and a resumed run may have another one.
    """
    key = hashlib.blake2b(f"{seed}/{source}/{epoch}".encode(), digest_size=16).digest()
    philox = np.random.Philox(key=int.from_bytes(key, "little"))
    return np.argsort(philox.random_raw(num_sequences), kind="stable")


def read_pieces(
    corpora: Sequence[Corpus], sequence: SequenceRef, ranges: Iterable[tuple[int, int]]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Inputs, targets and counts (see ``Corpus.read``) of token ranges of ``sequence``, one after the other.

    Ranges [start, stop) count from the start of the sequence; only their tokens are read.

    Raises:
        OutOfRange: a range leaves the sequence.
    """
    corpus = corpora[sequence.source]
    pieces = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.bool_))]
    for start, stop in ranges:
        if not 0 <= start <= stop <= sequence.length:
            raise OutOfRange(
                f"{corpus.name}, sequence {sequence.identity}", sequence.document, start, stop, sequence.length
            )
        pieces.append(corpus.read(sequence.document, sequence.start + start, sequence.start + stop))
    inputs, targets, counts = zip(*pieces, strict=True)
    return np.concatenate(inputs), np.concatenate(targets), np.concatenate(counts)


def _compare(place: str, mine: BaseModel, theirs: BaseModel, fields: Iterable[str]) -> list[str]:
    pairs = ((field, getattr(mine, field), getattr(theirs, field)) for field in fields)
    return [f"{place}{field} {here} here, {there} in the state" for field, here, there in pairs if here != there]
