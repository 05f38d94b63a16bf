"""The sampler: every sequence once per epoch, mixtures by tokens, exact after every resume."""

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.runtime.data import (
    Batch,
    Corpus,
    CorpusSource,
    DataConfig,
    OutOfRange,
    Sampler,
    SamplerMismatch,
    SequenceRef,
    read_pieces,
)
from evermesh.runtime.data.sampler import sequence_order
from tests.runtime.data.written import write_corpus

FROZEN_ORDER = [3, 2, 7, 6, 5, 1, 8, 4, 0, 9]
LENGTHS = st.lists(st.integers(1, 70), min_size=1, max_size=30)


@pytest.fixture(autouse=True, scope="module")
def _temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the corpora of all hypothesis examples where pytest removes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("corpora")))
        yield


def config(*weights: float, context: int = 16, batch_tokens: int = 64) -> DataConfig:
    sources = tuple(CorpusSource(path=Path("unused"), weight=weight) for weight in weights)
    return DataConfig(sources=sources, context=context, batch_tokens=batch_tokens)


def corpus_of(lengths: list[int], name: str = "corpus", seed: int = 0) -> Corpus:
    return write_corpus(Path(tempfile.mkdtemp()) / name, lengths, seed=seed)


def sequences(sampler: Sampler) -> Iterator[SequenceRef]:
    while True:
        yield from sampler.next_batch().sequences


def all_parts(lengths: list[int], context: int) -> Counter[tuple[int, int, int]]:
    return Counter(
        (document, start, min(start + context, length))
        for document, length in enumerate(lengths)
        for start in range(0, length, context)
    )


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, context=st.integers(1, 80), batch_tokens=st.integers(1, 200), seed=st.integers(0, 2**40))
def test_an_epoch_is_all_parts_of_all_documents_once(
    lengths: list[int], context: int, batch_tokens: int, seed: int
) -> None:
    sampler = Sampler([corpus_of(lengths)], config(1.0, context=context, batch_tokens=batch_tokens), seed)
    drawn = sequences(sampler)
    expected = all_parts(lengths, context)
    for _ in range(3):
        epoch = [next(drawn) for _ in range(expected.total())]
        assert Counter((sequence.document, sequence.start, sequence.stop) for sequence in epoch) == expected
        assert all(sequence.is_split == (lengths[sequence.document] > context) for sequence in epoch)


@settings(max_examples=30, deadline=None)
@given(lengths=LENGTHS, batch_tokens=st.integers(1, 200))
def test_a_batch_is_full_the_next_sequence_does_not_fit(lengths: list[int], batch_tokens: int) -> None:
    sampler = Sampler([corpus_of(lengths)], config(1.0, batch_tokens=batch_tokens), 0)
    batches = [sampler.next_batch() for _ in range(12)]
    for batch, following in pairwise(batches):
        assert len(batch.sequences) == 1 or batch.num_tokens <= batch_tokens
        assert batch.num_tokens + following.lengths[0] > batch_tokens


@settings(max_examples=25, deadline=None)
@given(
    sources=st.lists(st.tuples(LENGTHS, st.floats(0.1, 10)), min_size=1, max_size=3),
    batch_tokens=st.integers(1, 300),
    seed=st.integers(0, 1000),
)
def test_a_sampler_resumed_after_any_batch_yields_what_an_uninterrupted_one_does(
    sources: list[tuple[list[int], float]], batch_tokens: int, seed: int
) -> None:
    corpora = [corpus_of(lengths) for lengths, _ in sources]
    settings_ = config(*(weight for _, weight in sources), batch_tokens=batch_tokens)
    uninterrupted = Sampler(corpora, settings_, seed)
    expected = [uninterrupted.next_batch() for _ in range(10)]
    state = json.dumps(Sampler(corpora, settings_, seed).state_dict())
    for batch in expected:
        resumed = Sampler(corpora, settings_, seed)
        resumed.load_state_dict(json.loads(state))
        assert resumed.next_batch() == batch
        state = json.dumps(resumed.state_dict())
    assert json.loads(state) == uninterrupted.state_dict()


@settings(max_examples=25, deadline=None)
@given(sources=st.lists(st.tuples(LENGTHS, st.floats(0.1, 10)), min_size=2, max_size=4))
def test_no_source_is_more_than_one_sequence_ahead_of_its_share_of_tokens(
    sources: list[tuple[list[int], float]],
) -> None:
    weights = [weight for _, weight in sources]
    drawn = sequences(Sampler([corpus_of(lengths) for lengths, _ in sources], config(*weights), 0))
    tokens = [0] * len(sources)
    for _ in range(300):
        sequence = next(drawn)
        tokens[sequence.source] += sequence.length
        for own, weight in zip(tokens, weights, strict=True):
            ahead = own - weight / sum(weights) * sum(tokens)
            assert -16 * (len(sources) - 1) - 1e-6 <= ahead <= 16 + 1e-6


def test_the_shares_of_a_mixture_are_the_weights() -> None:
    corpora = [corpus_of([3] * 50), corpus_of([500] * 5), corpus_of([40] * 20)]
    sampler = Sampler(corpora, config(1, 2, 5, context=128, batch_tokens=10_000), 0)
    tokens: Counter[int] = Counter()
    for _ in range(20):
        for sequence in sampler.next_batch().sequences:
            tokens[sequence.source] += sequence.length
    shares = [tokens[source] / tokens.total() for source in range(3)]
    assert shares == pytest.approx([1 / 8, 2 / 8, 5 / 8], abs=128 / tokens.total() * 2)


def test_sources_of_equal_deficit_are_taken_in_their_order() -> None:
    drawn = sequences(Sampler([corpus_of([4] * 3) for _ in range(3)], config(1, 1, 1), 0))
    assert [next(drawn).source for _ in range(9)] == [0, 1, 2] * 3


def test_epochs_sources_and_seeds_have_different_orders() -> None:
    orders = {
        tuple(sequence_order(seed, source, epoch, 50)) for seed in range(3) for source in range(3) for epoch in range(3)
    }
    assert len(orders) == 27
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_the_order_stays_what_it_was_when_checkpoints_were_written() -> None:
    assert sequence_order(0, 0, 0, 10).tolist() == FROZEN_ORDER


def test_every_first_place_is_equally_likely() -> None:
    firsts = Counter(int(sequence_order(seed, 0, 0, 4)[0]) for seed in range(4000))
    chi_square = sum((count - 1000) ** 2 / 1000 for count in firsts.values())
    assert chi_square < 16.3  # 3 degrees of freedom, p = 0.001


def test_the_state_does_not_grow_with_the_corpus_or_the_steps() -> None:
    small = Sampler([corpus_of([5])], config(1.0), 0)
    large = Sampler([corpus_of([5] * 3000)], config(1.0), 0)
    for _ in range(100):
        large.next_batch()
    assert abs(len(json.dumps(small.state_dict())) - len(json.dumps(large.state_dict()))) < 20


def test_the_same_seed_gives_the_same_batches_and_digests_on_every_rank() -> None:
    corpus = corpus_of([30] * 40)
    ranks = [Sampler([corpus], config(1.0), 7) for _ in range(3)]
    for _ in range(20):
        assert len({rank.next_batch().digest for rank in ranks}) == 1


@pytest.fixture
def corpus() -> Corpus:
    return corpus_of([30] * 10)


def changed(state: dict[str, Any], **values: object) -> dict[str, Any]:
    state = copy.deepcopy(state)
    state["sources"][0].update(values)
    return state


def test_a_state_of_another_seed_context_mixture_or_corpus_is_refused_with_the_facts(corpus: Corpus) -> None:
    state = Sampler([corpus], config(1.0), 7).state_dict()
    longer, altered = corpus_of([30] * 11), corpus_of([30] * 10, seed=1)
    cases = [
        (Sampler([corpus], config(1.0), 8), "seed 8 here, 7 in the state"),
        (Sampler([corpus], config(1.0, context=32), 7), "context 32 here, 16 in the state"),
        (Sampler([longer], config(1.0), 7), "tokens 330 here, 300 in the state"),
        (Sampler([altered], config(1.0), 7), f"digest {altered.digest} here, {corpus.digest} in the state"),
        (Sampler([corpus, corpus], config(1, 3), 7), "2 sources here, 1 in the state"),
    ]
    for sampler, message in cases:
        before = sampler.state_dict()
        with pytest.raises(SamplerMismatch, match=message):
            sampler.load_state_dict(state)
        assert sampler.state_dict() == before


def test_a_state_with_other_weights_is_refused(corpus: Corpus) -> None:
    state = Sampler([corpus, corpus], config(1, 3), 0).state_dict()
    with pytest.raises(SamplerMismatch, match=r"share 0\.5 here, 0\.25 in the state"):
        Sampler([corpus, corpus], config(1, 1), 0).load_state_dict(state)
    Sampler([corpus, corpus], config(2, 6), 0).load_state_dict(state)


def test_what_is_not_a_state_is_refused(corpus: Corpus) -> None:
    sampler = Sampler([corpus], config(1.0), 0)
    state = sampler.state_dict()
    for wrong in ({}, {**state, "extra": 1}, changed(state, position=-1), changed(state, position=20)):
        with pytest.raises(SamplerMismatch):
            sampler.load_state_dict(wrong)


def test_resuming_with_another_batch_size_goes_on_with_the_next_sequence(corpus: Corpus) -> None:
    first = Sampler([corpus], config(1.0), 0)
    head = first.next_batch().sequences
    other = Sampler([corpus], config(1.0, batch_tokens=200), 0)
    other.load_state_dict(first.state_dict())
    rest = other.next_batch().sequences + other.next_batch().sequences
    order = [sequence for sequence, _ in zip(sequences(Sampler([corpus], config(1.0), 0)), range(20), strict=False)]
    assert [*head, *rest][:20] == order[: len(head) + len(rest)]


def test_pieces_are_the_asked_ranges_of_the_sequence(corpus: Corpus) -> None:
    sequence = SequenceRef(source=0, document=3, start=16, stop=30, document_length=30)
    whole = corpus.read(3, 16, 30)
    ranges = [(0, 3), (3, 3), (9, 14)]
    kept = [position for start, stop in ranges for position in range(start, stop)]
    for piece, all_tokens in zip(read_pieces([corpus], sequence, ranges), whole, strict=True):
        assert np.array_equal(piece, all_tokens[kept])
    assert [piece.size for piece in read_pieces([corpus], sequence, [])] == [0, 0, 0]


def test_pieces_outside_the_sequence_are_refused_even_inside_the_document(corpus: Corpus) -> None:
    sequence = SequenceRef(source=0, document=3, start=0, stop=16, document_length=30)
    with pytest.raises(OutOfRange, match=r"\[10:17\)"):
        read_pieces([corpus], sequence, [(10, 17)])


def test_a_batch_counts_its_tokens_and_split_sequences() -> None:
    batch = Batch((SequenceRef(0, 17, 0, 8192, 9000), SequenceRef(0, 17, 8192, 9000, 9000), SequenceRef(1, 2, 0, 5, 5)))
    assert batch.lengths == (8192, 808, 5)
    assert (batch.num_tokens, batch.num_split) == (9005, 2)
    assert [sequence.identity for sequence in batch.sequences] == ["0/17[0:8192)", "0/17[8192:9000)", "1/2[0:5)"]
    assert batch.digest != Batch(batch.sequences[::-1]).digest
