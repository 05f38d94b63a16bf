"""A run that calibrates its cost model: what it learns, when all ranks know it, and what survives a restart."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from evermesh.checkpoint import latest
from evermesh.fault.events import Event, read_events
from evermesh.parallelism import CostModel, plan_batch
from evermesh.parallelism.calibration import CalibrationPolicy
from evermesh.runtime import TrainConfig, read_telemetry
from evermesh.runtime.feed import PlannedBatch
from evermesh.runtime.reporting import StepOutcome
from evermesh.runtime.trainer import Trainer
from tests.cluster import run_ranks
from tests.runtime.test_trainer import _on, small_config

EAGER = {"every": 2, "leaves_out": 2, "least_observations": 24}
WRONG = CostModel(token_s=0.2, pair_s=1e-3, micro_batch_s=1e-3, ring_step_s=1e-4, ring_token_s=1e-7)
"""Of a machine on which a micro-batch of 200 tokens takes a minute, and which starts one in no time."""


@dataclasses.dataclass(frozen=True)
class _Step:
    cost: CostModel
    version: int
    """That the plan was made with, as it says itself."""
    predicted_s: float
    measured_s: float
    """Of this rank, until the ranks met to sum gradients."""
    saved: dict[str, Any]
    waited_s: float


class _Watched(Trainer):
    """Remembers what each step was planned with."""

    steps: list[_Step]

    def train_step(self, batch: PlannedBatch) -> StepOutcome:
        outcome = super().train_step(batch)
        found = _Step(
            self.cost,
            batch.plan.cost_version,
            batch.plan.certificate.makespan_s,
            outcome.compute_s,
            self.progress.calibration,
            batch.waited_s,
        )
        self.steps = [*getattr(self, "steps", []), found]
        return outcome


def _config(corpus: Path, **changes: Any) -> dict[str, Any]:
    cost = WRONG.model_dump(mode="json")
    return small_config(
        corpus, **({"cost": cost, "calibrate": EAGER, "steps": 36, "layout": {"capacity": 300}} | changes)
    )


def _fit(rank: int, workers: int, values: dict[str, Any], directory: Path, resume: bool) -> list[_Step]:
    trainer = _Watched(_on(workers, values), directory=directory, resume=resume)
    trainer.fit()
    return trainer.steps


def _events(directory: Path) -> list[Event]:
    return [event for event in read_events(directory / "events.jsonl") if event.kind == "cost model"]


@pytest.fixture(scope="module")
def healed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[_Step]]]:
    """A run of 36 steps on two ranks, interrupted after the 29th, by rank."""
    directory = tmp_path_factory.mktemp("healed")
    return directory, run_ranks(2, _fit, _config(corpus, stop_at=29), directory, False)


def test_a_model_that_is_set_wrong_heals_in_a_run(healed: tuple[Path, list[list[_Step]]]) -> None:
    """Errors in logarithms, since the model may be off by a large factor; the machine is busy, so nearer must do."""
    _, ranks = healed
    measured = [
        max(of_ranks) for of_ranks in zip(*([step.measured_s for step in steps] for steps in ranks), strict=True)
    ]
    ratios = [max(step.predicted_s / s, s / step.predicted_s) for step, s in zip(ranks[0], measured, strict=True)]
    print(f"\npredicted makespan off by a factor of {[round(ratio, 2) for ratio in ratios]}")
    first, last = sorted(ratios[:4])[1], sorted(ratios[-5:])[2]
    assert first > 5
    assert last < first / 3


def test_all_ranks_know_a_new_model_for_the_same_step_and_the_event_announced_it(
    healed: tuple[Path, list[list[_Step]]],
) -> None:
    directory, ranks = healed
    for one, other in zip(*ranks, strict=True):
        assert one.cost == other.cost
        assert one.cost.version == one.version == other.version
        assert one.saved == other.saved
    # what the last step announced is for the run that goes on
    events = [event for event in _events(directory) if event.step is not None and event.step < len(ranks[0])]
    assert events
    for event in events:
        assert event.step is not None
        before, behind = ranks[0][event.step - 1], ranks[0][event.step]
        assert before.cost == CostModel.model_validate(event.fields["old"])
        assert behind.cost == CostModel.model_validate(event.fields["new"])
        assert behind.version == before.version + 1 == event.fields["version"]
        assert event.text.startswith(f"from step {event.step + 1} on: version {behind.version}, error ")
        error_before, error_after = event.fields["error_before"], event.fields["error_after"]
        assert isinstance(error_before, float)
        assert isinstance(error_after, float)
        assert error_after < error_before
        assert event.fields["standard_errors"]


def test_a_run_that_is_resumed_goes_on_with_the_model_that_was_announced(
    corpus: Path, healed: tuple[Path, list[list[_Step]]]
) -> None:
    directory, ranks = healed
    assert latest(directory / "checkpoints") is not None
    saved = CostModel.model_validate(ranks[0][-1].saved["calibration"]["model"])
    assert saved.version > 0
    resumed = run_ranks(2, _fit, _config(corpus, stop_at=31), directory, True)
    assert [steps[0].cost for steps in resumed] == [saved, saved]
    again = run_ranks(1, _fit, _config(corpus, stop_at=32, cost=None, layout={"capacity": 600}), directory, True)
    assert again[0][0].cost.version == 0, "coefficients that are given anew count"


def _is_planned_alike(rank: int, workers: int, values: dict[str, Any]) -> bool:
    """Whether every plan is what its recorded model gives."""

    class Checked(Trainer):
        alike = True

        def train_step(self, batch: PlannedBatch) -> StepOutcome:
            outcome = super().train_step(batch)
            again = plan_batch(batch.plan.lengths, self.config.layout, self.cost)
            self.alike = self.alike and again.to_json() == batch.plan.to_json()
            return outcome

    trainer = Checked(_on(workers, values))
    trainer.fit()
    return trainer.alike


def test_every_plan_is_a_function_of_its_lengths_and_its_recorded_model(corpus: Path) -> None:
    assert run_ranks(2, _is_planned_alike, _config(corpus, steps=12)) == [True, True]


def test_the_step_record_says_how_long_a_step_waited_for_its_plan(healed: tuple[Path, list[list[_Step]]]) -> None:
    """Plans are made during the step before: a step waits for a part of itself at most, and usually for nothing."""
    directory, ranks = healed
    reports = read_telemetry(directory / "telemetry.jsonl")[: len(ranks[0])]
    assert [report.plan_wait_s for report in reports] == [step.waited_s for step in ranks[0]]
    waits = sorted(report.plan_wait_s for report in reports[1:])
    steps = sorted(report.step_s for report in reports[1:])
    print(f"\nwaited {waits[len(waits) // 2]:.2e} s of {steps[len(steps) // 2]:.2e} s")
    assert all(0 <= report.plan_wait_s <= report.step_s for report in reports)
    assert waits[len(waits) // 2] < 0.1 * steps[len(steps) // 2]


def test_calibration_is_off_unless_asked_for(corpus: Path) -> None:
    asked = [
        TrainConfig.model_validate(small_config(corpus, **changes)).calibrate
        for changes in ({}, {"calibrate": "off"}, {"calibrate": "on"}, {"calibrate": True}, {"calibrate": {"every": 3}})
    ]
    assert asked == [None, None, CalibrationPolicy(), CalibrationPolicy(), CalibrationPolicy(every=3)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"deterministic": True}, "plans depend on measured times, but deterministic asks for the same bits"),
        ({"layout": {"pp": 2, "capacity": 200}}, r"calibrate is on, but layout.pp is 2"),
    ],
)
def test_where_times_must_not_count_or_cannot_be_measured_calibration_is_refused(
    changes: dict[str, Any], reason: str, corpus: Path
) -> None:
    with pytest.raises(ValidationError, match=reason):
        TrainConfig.model_validate(small_config(corpus, calibrate="on", **changes))


def test_a_planner_of_ones_own_cannot_be_calibrated(corpus: Path) -> None:
    class Own:
        def plan(self, lengths: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(TypeError, match="but Own plans"):
        Trainer(TrainConfig.model_validate(small_config(corpus, calibrate="on")), planner=Own())
