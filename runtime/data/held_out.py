"""Documents that a run is evaluated on and never trained on: the same for every run with these corpora and this number of
tokens, whatever its seed, its layout and the step.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evermesh.runtime.data.batch import Batch, SequenceRef
from evermesh.runtime.data.config import DataConfig
from evermesh.runtime.data.corpus import Corpus
from evermesh.runtime.data.errors import HeldOutTooLarge


class HeldOut(NamedTuple):
    """What is kept from training."""

    documents: tuple[NDArray[np.int64], ...]
    """Of every source: whole documents."""
    batches: tuple[Batch, ...]
    """What is evaluated of them, batches as large as those of training: of the last document of a source maybe only the
    beginning, so that the tokens are exactly as many as asked for."""

    @classmethod
    def none(cls, corpora: Sequence[Corpus]) -> "HeldOut":
        """Of a run that is not evaluated."""
        return cls(tuple(np.empty(0, np.int64) for _ in corpora), ())


def hold_out(corpora: Sequence[Corpus], config: DataConfig, num_tokens: int) -> HeldOut:
    """Set ``num_tokens`` of the corpora aside, of each by its weight; ``corpora[i]`` is that of ``config.sources[i]``.

    A corpus that is given twice is trained on in neither place where one holds its documents out.

    Raises:
        HeldOutTooLarge: nothing of a corpus would be left to train on.
    """
    weights = np.array([source.weight for source in config.sources])
    edges = np.rint(num_tokens * np.cumsum(weights) / weights.sum()).astype(np.int64)
    quotas = np.diff(edges, prepend=0).tolist()
    chosen = [_documents(corpus, quota) for corpus, quota in zip(corpora, quotas, strict=True)]
    # of one corpus all choose the first of one order, so the longest choice has the others in it
    documents: dict[str, NDArray[np.int64]] = {}
    for corpus, of_source in zip(corpora, chosen, strict=True):
        documents[corpus.digest] = max(documents.get(corpus.digest, of_source), of_source, key=len)
    sequences = [
        sequence
        for source, (corpus, of_source, quota) in enumerate(zip(corpora, chosen, quotas, strict=True))
        for sequence in _sequences(corpus, source, of_source.tolist(), quota, config.context)
    ]
    return HeldOut(
        tuple(documents[corpus.digest] for corpus in corpora), tuple(_batches(sequences, config.batch_tokens))
    )


def _documents(corpus: Corpus, quota: int) -> NDArray[np.int64]:
    """Enough documents for ``quota`` tokens: those whose hash is the smallest.

    The hash is of the content of the corpus and the number of the document in it (Philox, as in ``sequence_order``).
    """
    key = hashlib.blake2b(f"held out/{corpus.digest}".encode(), digest_size=16).digest()
    hashes = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(len(corpus))
    order = np.argsort(hashes, kind="stable")
    count = int(np.searchsorted(np.cumsum(corpus.lengths[order]), quota)) + 1 if quota else 0
    if count >= len(corpus):
        raise HeldOutTooLarge(
            f"train.evaluation.tokens asks for {quota:,} tokens of {corpus.name}, which has {corpus.num_tokens:,} in "
            f"{len(corpus):,} documents: none would be left to train on. Lower it."
        )
    return order[:count]


def _sequences(corpus: Corpus, source: int, documents: Sequence[int], quota: int, context: int) -> list[SequenceRef]:
    """``quota`` tokens of ``documents`` in order, cut at the context as in training."""
    sequences = []
    for document in documents:
        length = corpus.length(document)
        last = min(length, quota)
        quota -= last
        starts = range(0, last, context)
        sequences += [SequenceRef(source, document, start, min(start + context, last), length) for start in starts]
    return sequences


def _batches(sequences: Sequence[SequenceRef], batch_tokens: int) -> list[Batch]:
    """Sequences in order, up to ``batch_tokens`` in each batch, at least one."""
    batches: list[list[SequenceRef]] = []
    room = 0
    for sequence in sequences:
        if sequence.length > room or not batches:
            batches.append([])
            room = batch_tokens
        batches[-1].append(sequence)
        room -= sequence.length
    return [Batch(tuple(batch)) for batch in batches]
