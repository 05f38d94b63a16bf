"""Samples that are tried again: each is trained once or set aside, and a bad one is found by halving."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.runtime.data import Batch, SequenceRef
from evermesh.runtime.errors import TrainingDiverged
from evermesh.runtime.guard import GuardConfig
from evermesh.runtime.guard.config import SpikePolicy
from evermesh.runtime.guard.retries import NOTICE, RetryQueue, names_of
from evermesh.runtime.guard.step_guard import StepGuard, Verdict
from evermesh.runtime.state import Progress

FRESH = 6
"""Sequences that a batch is filled up to."""


def sequence(number: int) -> SequenceRef:
    return SequenceRef(0, number, 0, 10, 10)


def batches(queue: RetryQueue, steps: int) -> Iterator[tuple[int, Batch]]:
    """As a feed makes them: what a batch holds is decided one step before it is trained."""
    numbers = itertools.count()

    def drawn(step: int) -> Batch:
        again = queue.due(step)
        fresh = tuple(sequence(next(numbers)) for _ in range(max(1, FRESH - len(again))))
        return Batch((*again, *fresh), num_again=len(again))

    following = drawn(1)
    for step in range(1, steps + 1):
        batch = following
        if step < steps:
            following = drawn(step + 1)
        yield step, batch


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bad=st.sets(st.integers(0, 300), max_size=3),
    glitches=st.sets(st.integers(1, 60), max_size=4),
    within=st.integers(1, 20),
    max_retries=st.integers(1, 3),
    steps=st.integers(1, 160),
)
def test_every_sequence_is_trained_once_or_set_aside_or_waits(
    seed: int, bad: set[int], glitches: set[int], within: int, max_retries: int, steps: int
) -> None:
    queue, trained, drawn, skipped = RetryQueue(seed, steps, max_retries, within), Counter[int](), set[int](), 0
    for step, batch in batches(queue, steps):
        assert len({group.due for group in queue.groups}) == len(queue.groups)
        assert all(group.due >= step for group in queue.groups)
        numbers = [of.document for of in batch.sequences]
        drawn.update(numbers)
        if bad & set(numbers) or step in glitches:
            before = {group.due for group in queue.groups}
            queue.failed(step, batch)
            skipped += 1
            assert all(group.due >= step + NOTICE for group in queue.groups if group.due not in before)
        else:
            queue.passed(step)
            trained.update(numbers)
    aside = {of.document for of in queue.set_aside}
    waiting = [of.document for group in queue.groups for of in group.sequences]
    assert queue.num_waiting == len(waiting)
    assert sorted([*trained.elements(), *aside, *waiting]) == sorted(drawn)
    assert not bad & trained.keys()
    if not glitches and len(bad) == 1:
        assert aside <= bad, "only another bad one in every batch of its tries can take an innocent one along"
        rounds = 1 + math.ceil(math.log2(FRESH)) + max_retries
        assert skipped <= len(bad & drawn) * (rounds + 1), "a bad one costs as many steps as it has to be halved"


def test_a_bad_one_is_found_and_all_others_are_trained() -> None:
    queue, trained = RetryQueue(seed=1, steps=60, max_retries=2, within=8), set[int]()
    skipped = []
    for step, batch in batches(queue, 60):
        numbers = {of.document for of in batch.sequences}
        if 20 in numbers:
            queue.failed(step, batch)
            skipped.append((step, len(batch.sequences[: batch.num_again])))
        else:
            queue.passed(step)
            trained |= numbers
    assert [group for _, group in skipped] == [0, 6, 3, 1]
    assert (queue.set_aside, queue.groups) == ((sequence(20),), ())
    assert trained == set(range(max(trained) + 1)) - {20}


def test_what_was_set_aside_is_not_tried_again_when_another_epoch_brings_it() -> None:
    queue = RetryQueue(seed=1, steps=60, max_retries=1, within=1)
    alone = Batch((sequence(3),))
    assert queue.failed(1, alone) == ()
    assert queue.due(3) == (sequence(3),)
    assert queue.failed(3, Batch((sequence(3),), num_again=1)) == (sequence(3),)
    assert queue.failed(20, Batch((sequence(2), sequence(3)))) == (sequence(3),)
    assert queue.set_aside == (sequence(3),)
    assert queue.due(22) == (sequence(2),)


def test_without_retries_all_of_a_step_is_set_aside() -> None:
    queue = RetryQueue(seed=0, steps=9, max_retries=0, within=4)
    batch = Batch((sequence(1), sequence(2)))
    assert queue.failed(4, batch) == batch.sequences == queue.set_aside
    assert not queue.groups


def test_the_end_of_the_run_is_used_before_anything_is_left() -> None:
    queue = RetryQueue(seed=3, steps=10, max_retries=2, within=16)
    for number in range(5):
        queue.failed(5, Batch((sequence(number),)))
    assert sorted(group.due for group in queue.groups) == [7, 8, 9, 10, 11]


def guarded(config: GuardConfig | None = None, progress: Progress | None = None) -> StepGuard:
    return StepGuard(config or GuardConfig(), 5, progress or Progress(), seed=0, steps=100)


def test_a_spike_that_stays_is_believed_and_ends_no_run() -> None:
    """Losses that have a reason to be higher: three are skipped, then updates go on with half the learning rate."""
    guard = guarded(GuardConfig(spikes=SpikePolicy(window=16, armed_after=8)))
    losses = [1.0 + step % 3 / 100 for step in range(20)] + [5.0 + step % 3 / 100 for step in range(40)] + [math.nan]
    verdicts = [guard.judge(step + 1, loss, 1.0, Batch((sequence(0),))) for step, loss in enumerate(losses)]
    assert [step for step, verdict in enumerate(verdicts) if not verdict.commits] == [20, 21, 22, 60]
    believed = [step for step, verdict in enumerate(verdicts) if verdict.commits and verdict.lr_scale == 0.5]
    assert believed[0] == 23
    assert believed == list(range(23, believed[-1] + 1))
    assert 8 <= len(believed) <= 10  # until half of the window knows them, and the first usual step behind
    assert guard.progress.skipped_in_a_row == 1


def test_three_bad_steps_in_a_row_halve_the_learning_rate_of_the_next_update_alone() -> None:
    guard = guarded()
    batch = Batch((sequence(0),))
    scales = [guard.judge(step, math.nan if step in (2, 3, 4) else 1.0, 1.0, batch).lr_scale for step in range(1, 8)]
    assert scales == [1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0]
    never = guarded(GuardConfig(lower_lr_after=None))
    assert {never.judge(step, math.nan if step < 4 else 1.0, 1.0, batch).lr_scale for step in range(1, 6)} == {1.0}


def test_a_suspicion_makes_a_step_a_bad_one_and_too_many_end_the_run() -> None:
    guard = guarded()
    batch = Batch((sequence(0), sequence(1)))
    verdict = guard.judge(1, 1.0, 1.0, batch, "rank 3 computed layer 1 twice")
    assert (verdict.commits, verdict.fault, verdict.num_waiting) == (False, "rank 3 computed layer 1 twice", 2)
    with pytest.raises(TrainingDiverged, match="the last 5 steps, up to step 5, were bad: now loss nan"):
        [guard.judge(step, math.nan, 1.0, batch) for step in range(2, 6)]


def test_a_guard_that_goes_on_from_its_state_decides_as_if_nothing_had_been() -> None:
    policy = GuardConfig.model_validate({"spikes": {"window": 8, "armed_after": 8}, "retry_within": 3})

    def loss(step: int) -> float:
        return 2.0 + 0.01 * (step % 5) + (100.0 if step in (11, 14, 25, 31) else 0.0)

    def run(stops: set[int]) -> list[tuple[Verdict, tuple[SequenceRef, ...]]]:
        guard, told = guarded(policy), []
        numbers = itertools.count()
        for step in range(1, 60):
            again = guard.retries.due(step)
            batch = Batch((*again, *(sequence(next(numbers)) for _ in range(4))), num_again=len(again))
            verdict = guard.judge(step, loss(step), 1.0, batch)
            told.append((verdict, batch.sequences))
            if step in stops:
                values = json.loads(json.dumps(guard.progress.guard))
                guard = guarded(policy, Progress(skipped_in_a_row=guard.progress.skipped_in_a_row, guard=values))
                guard.restore()
        return told

    assert any(not verdict.commits for verdict, _ in run(set()))
    assert run(set()) == run(set(range(1, 60))) == run({11, 12, 26})


def test_names_are_cut_off() -> None:
    assert names_of([sequence(1), sequence(2)]) == "0/1[0:10), 0/2[0:10)"
    assert names_of([sequence(number) for number in range(1, 1_500)], most=1) == "0/1[0:10) and 1,498 more"
