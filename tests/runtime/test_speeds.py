"""A rank that is told to be slow gets less to do from an announced step on, and the run computes the same."""

from pathlib import Path
from typing import Any

import pytest

from evermesh.fault.events import read_events
from evermesh.parallelism.layout import Layout
from evermesh.runtime import read_telemetry
from evermesh.runtime.feed import PlannedBatch
from evermesh.runtime.reporting import StepOutcome
from evermesh.runtime.speeds import hdp_speeds
from evermesh.runtime.trainer import Trainer
from tests.cluster import run_ranks
from tests.runtime.test_trainer import _on, small_config

SPEED = 0.25


class _Watched(Trainer):
    """Remembers with which speeds each step was planned, and how many tokens its ranks got."""

    steps: list[tuple[int, list[int]]]

    def train_step(self, batch: PlannedBatch) -> StepOutcome:
        outcome = super().train_step(batch)
        tokens = [sum(micro_batch.num_tokens for micro_batch in rank) for rank in batch.plan.ranks]
        self.steps = [*getattr(self, "steps", []), (batch.plan.speeds_version, tokens)]
        return outcome


def _train(rank: int, workers: int, values: dict[str, Any], directory: Path, told: bool) -> list[tuple[int, list[int]]]:
    trainer = _Watched(_on(workers, values), directory=directory)
    if told and rank == 0:
        answers = iter([None, None, {1: SPEED}, None, None, {}])
        trainer.speeds.told = lambda: next(answers, None)
    trainer.fit()
    return trainer.steps


def _run(corpus: Path, directory: Path, told: bool, **changes: Any) -> list[tuple[int, list[int]]]:
    directory.mkdir()
    values = small_config(corpus, layout={"capacity": 800}, checkpoint={"every": None}, **changes)
    found = run_ranks(2, _train, values, directory, told)
    assert found[0] == found[1]
    first: list[tuple[int, list[int]]] = found[0]
    return first


def test_a_slow_rank_gets_less_to_do_and_losses_stay_what_they_are(corpus: Path, tmp_path: Path) -> None:
    steps = _run(corpus, tmp_path / "told", True)
    assert [version for version, _ in steps] == [0, 0, 1, 1, 1, 2, 2, 2]
    shares = [tokens[1] / sum(tokens) for _, tokens in steps]
    assert max(shares[2:5]) < 0.4 < min(shares[:2] + shares[5:])
    events = [event for event in read_events(tmp_path / "told/events.jsonl") if event.kind == "speeds"]
    assert [event.fields["from_step"] for event in events] == [3, 6]
    assert "rank 1 0.25" in events[0].text
    assert "all nominal" in events[1].text
    _run(corpus, tmp_path / "clean", False)
    losses = [[one.loss for one in read_telemetry(tmp_path / name / "telemetry.jsonl")] for name in ("told", "clean")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_deterministic_runs_refuse_it(corpus: Path, tmp_path: Path) -> None:
    steps = _run(corpus, tmp_path / "told", True, deterministic=True, steps=4)
    assert {version for version, _ in steps} == {0}
    (event,) = [event for event in read_events(tmp_path / "told/events.jsonl") if event.kind == "speeds refused"]
    assert "train.deterministic is on" in event.text


def test_an_hdp_rank_is_as_slow_as_the_slowest_of_those_that_share_its_part() -> None:
    layout = Layout(capacity=100, hdp=2, tp=2)
    assert hdp_speeds({}, layout) == (1.0, 1.0)
    assert hdp_speeds({2: 0.9, 3: 0.5, 99: 0.1}, layout) == (1.0, 0.5)
