"""Training with bad steps: the same bits as without what was in them, on every layout, stopped anywhere."""

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evermesh.fault.events import read_events
from evermesh.runtime import TrainConfig, read_telemetry
from evermesh.runtime.data import Batch, Sampler, open_sources
from evermesh.runtime.trainer import Trainer
from tests.cluster import run_ranks
from tests.runtime.guard.training import SPIKES, Run, config_of, feed_with, poison, recorded

NOT_TRIED_AGAIN = {"spikes": SPIKES, "max_retries": 0}
TRIED_AGAIN = {"spikes": SPIKES, "retry_within": 5}
BAD_STEP, BAD_SEQUENCE = 15, "0/66[512:1024)"


def _fit(
    rank: int,
    workers: int,
    config: TrainConfig,
    directory: Path | None = None,
    resume: bool = False,
    bad: tuple[tuple[int, ...], tuple[str, ...]] = ((), ()),
    nan_at: int | None = None,
    batches: tuple[Batch, ...] = (),
) -> Run:
    """``bad``: steps and sequences whose loss is 1e4 times what it is; ``nan_at``: the step in which one gradient of rank 1
    is no number; ``batches``: what is trained in place of what the sampler draws."""
    trainer = Trainer(config, directory=directory, resume=resume)
    poison(trainer, *bad)
    accumulate = trainer.runner.accumulate

    def with_nan(batch: Any) -> Any:
        result = accumulate(batch)
        if rank == 1 and trainer.progress.step == nan_at:
            trainer.built.sets[0].gradients[7] = torch.nan
        return result

    trainer.runner.accumulate = with_nan  # type: ignore[method-assign]
    if batches:
        feed_with(trainer, batches)
    return recorded(trainer)


def drawn(config: TrainConfig, count: int) -> list[Batch]:
    """The batches of a run in which no step is bad."""
    corpora = open_sources(config.data)
    sampler = Sampler(corpora, config.data, config.seed)
    return [sampler.next_batch() for _ in range(count)]


def test_a_run_with_bad_steps_is_bit_for_bit_the_run_that_never_saw_them(corpus: Path) -> None:
    """Step 15 has 1e4 times its loss, and rank 1 alone has a gradient that is no number in step 19."""
    config = config_of(corpus, {"hdp": 2, "capacity": 300}, guard=NOT_TRIED_AGAIN)
    runs = run_ranks(2, _fit, config, None, False, ((BAD_STEP,), ()), 19)
    assert [sorted(run.skipped) for run in runs] == [[BAD_STEP, 19]] * 2
    batches = drawn(config, config.steps)
    others = tuple(batch for step, batch in enumerate(batches, 1) if step not in (BAD_STEP, 19))
    shorter = config.model_copy(update={"stop_at": len(others)})
    expected = run_ranks(2, _fit, shorter, None, False, ((), ()), None, others)
    assert [run.parameters for run in runs] == [run.parameters for run in expected]
    gone = [sequence.identity for step in (BAD_STEP, 19) for sequence in batches[step - 1].sequences]
    assert runs[0].set_aside == runs[1].set_aside == gone


def assert_all_accounted_for(run: Run, config: TrainConfig) -> None:
    """Every sequence that was drawn was trained once, or was set aside, or waits."""
    trained = [sequence.identity for batch in run.committed for sequence in batch.sequences]
    found = Counter([*trained, *run.set_aside, *run.waiting])
    order = [sequence.identity for batch in drawn(config, config.steps) for sequence in batch.sequences]
    assert found == Counter(order[: found.total()])


LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "two data ranks": {"hdp": 2, "capacity": 300},
    "tensor parallel": {"tp": 2},
    "pipeline": {"pp": 2},
}


@pytest.fixture(scope="module")
def on(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Run, Path]]:
    """A run with a bad step and a bad sequence on a layout, and its directory."""

    def run(layout: str) -> tuple[Run, Path]:
        config = config_of(corpus, LAYOUTS[layout], guard=TRIED_AGAIN, steps=36)
        directory = tmp_path_factory.mktemp("run")
        bad = ((BAD_STEP,), (BAD_SEQUENCE,))
        runs = run_ranks(config.layout.world_size, _fit, config, directory, False, bad)
        assert all((of.skipped, of.set_aside, of.waiting) == (runs[0].skipped, runs[0].set_aside, []) for of in runs)
        return runs[0], directory

    return functools.cache(run)


@pytest.mark.parametrize(
    "layout", ["two data ranks", *(pytest.param(layout, marks=pytest.mark.parity) for layout in list(LAYOUTS)[2:])]
)
def test_all_layouts_decide_alike(layout: str, on: Callable[[str], tuple[Run, Path]]) -> None:
    (expected, _), (found, _) = on("alone"), on(layout)
    assert found.skipped == expected.skipped
    assert found.committed == expected.committed


def test_a_bad_sequence_is_set_aside_and_all_others_are_trained_once(
    corpus: Path, on: Callable[[str], tuple[Run, Path]]
) -> None:
    config = config_of(corpus, LAYOUTS["two data ranks"], guard=TRIED_AGAIN, steps=36)
    run, directory = on("two data ranks")
    assert run.set_aside == [BAD_SEQUENCE]
    assert BAD_STEP in run.skipped
    assert_all_accounted_for(run, config)

    shorter = config.model_copy(update={"stop_at": len(run.committed)})
    expected = run_ranks(2, _fit, shorter, None, False, ((), ()), None, tuple(run.committed))
    assert run.parameters == expected[0].parameters

    events = list(read_events(directory / "events.jsonl"))
    assert [event.step for event in events if event.kind == "skipped"] == list(run.skipped)
    assert [event.fields["sequences"] for event in events if event.kind == "set aside"] == [[BAD_SEQUENCE]]
    told = next(event for event in events if event.kind == "not trained")
    assert (told.text, told.fields) == (f"set aside: {BAD_SEQUENCE}", {"set": [BAD_SEQUENCE], "waiting": []})
    reports = read_telemetry(directory / "telemetry.jsonl")
    assert [report.step for report in reports if not report.committed] == list(run.skipped)
    assert (reports[-1].num_set_aside, reports[-1].num_to_try_again) == (1, 0)
    again = {report.step: report.num_again for report in reports if report.num_again}
    assert max(again.values()) == len(run.skipped[min(run.skipped)].sequences)


def test_a_run_killed_while_samples_wait_goes_on_as_if_nothing_had_been(
    corpus: Path, tmp_path: Path, on: Callable[[str], tuple[Run, Path]]
) -> None:
    """Stopped right behind a bad step, with its samples due later; then with a group in the very next batch."""
    whole, directory = on("two data ranks")
    config = config_of(corpus, LAYOUTS["two data ranks"], guard=TRIED_AGAIN, steps=36)
    bad = ((BAD_STEP,), (BAD_SEQUENCE,))
    reports = read_telemetry(directory / "telemetry.jsonl")
    first, second = min(whole.skipped), next(report.step for report in reports if report.num_again) - 1
    assert first < second, "the run is to be stopped in places that differ"
    parts: list[Run] = []
    for stop in (first, second, None):
        resume = stop != first
        parts.append(run_ranks(2, _fit, config.model_copy(update={"stop_at": stop}), tmp_path, resume, bad)[0])
    assert parts[0].waiting
    assert parts[1].waiting
    assert [batch for part in parts for batch in part.committed] == whole.committed
    assert {step: batch for part in parts for step, batch in part.skipped.items()} == whole.skipped
    assert parts[-1].parameters == whole.parameters
    assert parts[-1].set_aside == whole.set_aside


@pytest.mark.parity
def test_on_another_layout_the_queue_goes_on_too(
    corpus: Path, tmp_path: Path, on: Callable[[str], tuple[Run, Path]]
) -> None:
    whole, directory = on("two data ranks")
    bad = ((BAD_STEP,), (BAD_SEQUENCE,))
    due = [report.step for report in read_telemetry(directory / "telemetry.jsonl") if report.num_again]
    config = config_of(corpus, LAYOUTS["two data ranks"], guard=TRIED_AGAIN, steps=36, stop_at=(last := due[1] - 1))
    run_ranks(2, _fit, config, tmp_path, False, bad)
    alone = config_of(corpus, LAYOUTS["alone"], guard=TRIED_AGAIN, steps=36)
    (rest,) = run_ranks(1, _fit, alone, tmp_path, True, bad)
    assert rest.committed == whole.committed[-len(rest.committed) :]
    assert (rest.skipped, rest.set_aside) == ({s: b for s, b in whole.skipped.items() if s > last}, whole.set_aside)
