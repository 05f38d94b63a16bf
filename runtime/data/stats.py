"""What a corpus looks like to a planner: how long its documents are and how many exceed the context."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evermesh.runtime.data.corpus import Corpus, Skipped
from evermesh.runtime.data.sampler import first_sequences

_QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)


@dataclass(frozen=True, slots=True)
class LengthBin:
    """Documents of at least ``start`` and less than ``stop`` tokens."""

    start: int
    stop: int
    documents: int
    tokens: int


@dataclass(frozen=True, slots=True)
class CorpusStats:
    """Numbers about a corpus; lengths are in tokens."""

    name: str
    vocabulary: int
    documents: int
    tokens: int
    """Tokens of all sequences: one epoch."""
    context: int
    """Longest sequence."""
    mean_length: float
    shortest: int
    longest: int
    quantiles: dict[float, int]
    """Length below or at which this fraction of the documents lies."""
    sequences: int
    """Sequences per epoch, after splitting."""
    documents_over_context: int
    split_parts: int
    """Sequences that are parts of a document longer than the context."""
    share_over_context: float
    """Fraction of the tokens in documents longer than the context."""
    histogram: tuple[LengthBin, ...]
    """Lengths in powers of two, from the shortest to the longest."""
    skipped: Skipped
    """What the preparation left out."""


def corpus_stats(corpus: Corpus, context: int) -> CorpusStats:
    """The numbers of ``corpus`` for sequences of at most ``context`` tokens."""
    lengths = corpus.lengths
    over = lengths > context
    tokens = int(lengths.sum())
    quantiles = np.quantile(lengths, _QUANTILES, method="inverted_cdf")
    return CorpusStats(
        name=corpus.name,
        vocabulary=corpus.vocabulary,
        documents=len(corpus),
        tokens=tokens,
        context=context,
        mean_length=tokens / len(corpus),
        shortest=int(lengths.min()),
        longest=int(lengths.max()),
        quantiles={fraction: int(length) for fraction, length in zip(_QUANTILES, quantiles, strict=True)},
        sequences=int(first_sequences(lengths, context)[-1]),
        documents_over_context=int(over.sum()),
        split_parts=int(first_sequences(lengths[over], context)[-1]),
        share_over_context=int(lengths[over].sum()) / tokens,
        histogram=_histogram(lengths),
        skipped=corpus.manifest.skipped,
    )


def _histogram(lengths: NDArray[np.int64]) -> tuple[LengthBin, ...]:
    exponents = np.frexp(lengths)[1] - 1  # exact: 2^e <= length < 2^(e+1)
    first = int(exponents.min())
    documents = np.bincount(exponents - first)
    tokens = np.bincount(exponents - first, weights=lengths)
    return tuple(
        LengthBin(1 << exponent, 2 << exponent, int(count), int(total))
        for exponent, (count, total) in enumerate(zip(documents, tokens, strict=True), start=first)
    )
