"""Outliers wait for each other: nothing is lost or trained twice, nothing is later than allowed, resumes are exact."""

import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from evermesh.runtime.data import (
    Batch,
    Corpus,
    CorpusSource,
    DataConfig,
    OutlierDelay,
    Sampler,
    SamplerMismatch,
    SequenceRef,
)
from tests.runtime.data.written import write_corpus

BATCHES = 25
DELAYS = st.builds(
    lambda thresholds, together, most_steps, more: OutlierDelay(
        thresholds=tuple(sorted(thresholds)), together=together, most_steps=most_steps, most_waiting=together + more
    ),
    st.sets(st.integers(1, 40), min_size=1, max_size=3),
    st.integers(2, 5),
    st.integers(1, 6),
    st.integers(0, 8),
)


@pytest.fixture(autouse=True, scope="module")
def _temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the corpora of all hypothesis examples where pytest removes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("corpora")))
        yield


def corpus_of(lengths: Sequence[int]) -> Corpus:
    return write_corpus(Path(tempfile.mkdtemp()) / "corpus", lengths)


def config(delay: OutlierDelay | None, batch_tokens: int = 300, context: int = 40, sources: int = 1) -> DataConfig:
    return DataConfig(
        sources=(CorpusSource(path=Path("unused")),) * sources,
        context=context,
        batch_tokens=batch_tokens,
        outlier_delay=delay,
    )


def drawn_order(corpora: list[Corpus], data: DataConfig, count: int) -> list[str]:
    """Identities in the order in which they are drawn when nothing waits."""
    sampler = Sampler(corpora, data.model_copy(update={"outlier_delay": None}), 3)
    order: list[str] = []
    while len(order) < count:
        order += [sequence.identity for sequence in sampler.next_batch().sequences]
    return order[:count]


def waiting_in(sampler: Sampler) -> list[tuple[str, int]]:
    """Identities of what waits, and how many batches each has waited, from the state that a checkpoint saves."""
    return [
        (f"{saved['source']}/{saved['document']}[{saved['start']}:{saved['stop']})", saved["steps"])
        for saved in sampler.state_dict()["waiting"]
    ]


def late_in(batch: Batch) -> list[SequenceRef]:
    return [sequence for sequence, steps in zip(batch.sequences, batch.steps_late, strict=True) if steps > 0]


@settings(max_examples=40, deadline=None)
@given(
    sources=st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=25), min_size=1, max_size=2),
    delay=DELAYS,
    batch_tokens=st.integers(200, 500),
)
def test_what_is_trained_and_what_waits_is_what_would_have_been_trained_and_no_later_than_it_says(
    sources: list[list[int]], delay: OutlierDelay, batch_tokens: int
) -> None:
    """The order in which sequences are drawn is that of a sampler without delay; every one leaves it once, when it says."""
    corpora, data = [corpus_of(lengths) for lengths in sources], config(delay, batch_tokens, sources=len(sources))
    sampler = Sampler(corpora, data, 3)
    trained: defaultdict[int, Counter[str]] = defaultdict(Counter)  # by the batch that a sequence was drawn for
    drawn_until = [0]
    for number in range(BATCHES):
        batch = sampler.next_batch()
        for sequence, steps in zip(batch.sequences, batch.steps_late, strict=True):
            trained[number - steps][sequence.identity] += 1
        waiting = waiting_in(sampler)
        drawn_until.append(sum(drawn.total() for drawn in trained.values()) + len(waiting))
        assert len(waiting) == batch.num_waiting <= delay.most_waiting
        assert all(steps < delay.most_steps for _, steps in waiting)
        assert batch.most_steps_late <= delay.most_steps
        assert all(sequence.length >= delay.thresholds[0] for sequence in late_in(batch))
        assert batch.num_tokens <= batch_tokens
    for identity, steps in waiting_in(sampler):
        trained[BATCHES - 1 - steps][identity] += 1
    order = drawn_order(corpora, data, drawn_until[-1])
    for number in range(BATCHES):
        assert trained[number] == Counter(order[drawn_until[number] : drawn_until[number + 1]])


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=25), delay=DELAYS)
def test_a_sampler_resumed_after_any_batch_yields_what_an_uninterrupted_one_does(
    lengths: list[int], delay: OutlierDelay
) -> None:
    corpora, data = [corpus_of(lengths)], config(delay)
    uninterrupted = Sampler(corpora, data, 3)
    state = json.dumps(uninterrupted.state_dict())
    for _ in range(12):
        resumed = Sampler(corpora, data, 3)
        resumed.load_state_dict(json.loads(state))
        assert resumed.next_batch() == uninterrupted.next_batch()
        state = json.dumps(resumed.state_dict())
        assert json.loads(state) == uninterrupted.state_dict()


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 90), min_size=1, max_size=25), delay=DELAYS, steps=st.integers(1, 12))
def test_a_run_that_ends_has_trained_all_that_it_has_drawn(lengths: list[int], delay: OutlierDelay, steps: int) -> None:
    corpora, data = [corpus_of(lengths)], config(delay)
    sampler = Sampler(corpora, data, 3)
    batches = [sampler.next_batch(ends=number == steps - 1) for number in range(steps)]
    trained = Counter(sequence.identity for batch in batches for sequence in batch.sequences)
    assert trained == Counter(drawn_order(corpora, data, trained.total()))
    assert (batches[-1].num_waiting, waiting_in(sampler)) == (0, [])
    assert max(batch.most_steps_late for batch in batches) <= delay.most_steps
    assert batches[-1].num_tokens <= data.batch_tokens


LONG_TAIL = [40 if number % 100 == 0 else 30 if number % 100 == 50 else 3 for number in range(1000)]


def test_outliers_are_trained_with_as_many_of_their_level_as_asked_for() -> None:
    delay = OutlierDelay(thresholds=(25, 35), together=3, most_steps=100)
    sampler = Sampler([corpus_of(LONG_TAIL)], config(delay), 3)
    counts: Counter[int] = Counter()
    for _ in range(40):
        lengths = sampler.next_batch().lengths
        counts.update([lengths.count(30), lengths.count(40)])
    assert counts.keys() <= {0, 3, 4, 5, 6}
    assert sum(counts[number] for number in (3, 4, 5, 6)) > 10


def test_a_level_that_never_fills_leaves_when_one_of_it_is_due() -> None:
    delay = OutlierDelay(thresholds=(25,), together=7, most_steps=2)
    sampler = Sampler([corpus_of(LONG_TAIL)], config(delay, batch_tokens=280), 3)
    due = 0
    for _ in range(30):
        before = waiting_in(sampler)
        late = [sequence.identity for sequence in late_in(sampler.next_batch())]
        if any(steps == 1 for _, steps in before):
            assert late == [identity for identity, _ in before]
            due += 1
    assert due > 5


def test_where_no_other_could_wait_the_level_with_most_tokens_leaves() -> None:
    """Two may wait, two of a level are trained together, and one of each level is there."""
    delay = OutlierDelay(thresholds=(25, 35), together=2, most_steps=100, most_waiting=2)
    sampler = Sampler([corpus_of(LONG_TAIL)], config(delay), 3)
    waiting = [
        {"source": 0, "document": document, "start": 0, "stop": stop, "steps": 1}
        for document, stop in ((50, 30), (100, 40))
    ]
    sampler.load_state_dict({**sampler.state_dict(), "waiting": waiting})
    assert [sequence.document for sequence in late_in(sampler.next_batch())] == [100]


def test_when_the_option_is_switched_off_all_that_waits_is_trained_at_once() -> None:
    corpora = [corpus_of(LONG_TAIL)]
    delayed = Sampler(corpora, config(OutlierDelay(thresholds=(25,), together=7, most_steps=20)), 3)
    while len(waiting_in(delayed)) < 5:
        delayed.next_batch()
    waiting = [identity for identity, _ in waiting_in(delayed)]
    without = Sampler(corpora, config(None), 3)
    without.load_state_dict(delayed.state_dict())
    assert [sequence.identity for sequence in late_in(without.next_batch())] == waiting
    assert not waiting_in(without)
    assert not late_in(without.next_batch())


def test_what_is_no_outlier_any_more_is_trained_at_once_and_a_smaller_batch_makes_nothing_later() -> None:
    corpora = [corpus_of(LONG_TAIL)]
    before = Sampler(corpora, config(OutlierDelay(thresholds=(25,), together=7, most_steps=20)), 3)
    waiting = [
        {"source": 0, "document": document, "start": 0, "stop": stop, "steps": steps}
        for document, stop, steps in ((50, 30, 7), (100, 40, 6), (150, 30, 0), (200, 40, 0))
    ]
    before.load_state_dict({**before.state_dict(), "waiting": waiting})
    after = Sampler(corpora, config(OutlierDelay(thresholds=(35,), together=2, most_steps=7), batch_tokens=80), 3)
    after.load_state_dict(before.state_dict())
    batch = after.next_batch()
    assert [(sequence.document, steps) for sequence, steps in zip(batch.sequences, batch.steps_late, strict=True)] == [
        (50, 8),
        (100, 7),
        (150, 1),
        (200, 1),
    ]


def test_a_run_saved_without_the_option_goes_on_with_it() -> None:
    corpora = [corpus_of(LONG_TAIL)]
    before = Sampler(corpora, config(None), 3)
    before.next_batch()
    state = {name: value for name, value in before.state_dict().items() if name != "waiting"}
    after = Sampler(corpora, config(OutlierDelay(thresholds=(25,))), 3)
    after.load_state_dict(state)
    assert set(after.next_batch().steps_late) == {0}


@pytest.mark.parametrize(
    "wrong",
    [{"source": 1}, {"document": 1000}, {"start": 1}, {"stop": 39}, {"start": 40, "stop": 80}],
)
def test_a_state_in_which_something_waits_that_is_no_sequence_is_refused(wrong: dict[str, int]) -> None:
    sampler = Sampler([corpus_of(LONG_TAIL)], config(OutlierDelay(thresholds=(25,))), 3)
    held = {"source": 0, "document": 100, "start": 0, "stop": 40, "steps": 2}
    sampler.load_state_dict({**sampler.state_dict(), "waiting": [held]})
    before = sampler.state_dict()
    with pytest.raises(SamplerMismatch, match="is no sequence"):
        sampler.load_state_dict({**before, "waiting": [held | wrong]})
    assert sampler.state_dict() == before


def test_lateness_is_told_per_token() -> None:
    short, long = SequenceRef(0, 0, 0, 10, 10), SequenceRef(0, 1, 0, 30, 30)
    batch = Batch((long, long, short), (4, 1, 0), 2)
    assert batch.mean_steps_late == pytest.approx((4 * 30 + 1 * 30) / 70)
    assert batch.most_steps_late == 4
    assert (Batch((short,)).mean_steps_late, Batch((short,)).most_steps_late) == (0.0, 0)


@pytest.mark.parametrize(
    ("delay", "message"),
    [
        ({"thresholds": []}, "at least 1 item"),
        ({"thresholds": [20, 20]}, "do not ascend"),
        ({"thresholds": [41]}, "no sequence is longer than the context, 40"),
        ({"thresholds": [30], "together": 11}, "Set outlier_delay.together to 10 or less"),
        ({"thresholds": [3], "together": 9, "most_waiting": 8}, "Set most_waiting to 9 or more"),
    ],
)
def test_delays_that_cannot_be_are_refused_at_the_door(delay: dict[str, Any], message: str) -> None:
    sources = [{"kind": "corpus", "path": "unused"}]
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate({"sources": sources, "context": 40, "batch_tokens": 300, "outlier_delay": delay})
