"""The demo's checks hold for a run that did what was promised, and fail for every run that did not."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from evermesh.fault.events import EventLog
from evermesh.launcher import Run, load_job
from evermesh.launcher.demo import checks
from evermesh.runtime.data import Corpus, Sampler, open_sources
from evermesh.runtime.telemetry import PlanSummary, StepReport
from tests.launcher.test_pictures import report

STEPS, STOP_AT = 12, 6


@pytest.fixture
def good(job_file: Path) -> tuple[Run, list[Corpus], list[StepReport]]:
    """A run on 4 and then 3 workers that kept every promise, as far as its telemetry tells."""
    config = load_job(job_file, ["workers=4", f"train.steps={STEPS}", f"train.stop_at={STOP_AT}"])
    corpora = open_sources(config.train.data)
    sampler = Sampler(corpora, config.train.data, config.train.seed)
    reports = [
        dataclasses.replace(
            report(step, workers=4 if step <= STOP_AT else 3, loss=5.0 - 0.1 * step),
            batch=sampler.next_batch().digest,
            plan=PlanSummary({1: 3, 2: 1, 3: 1, 4: 1}, (2, 3, 2, 2), 0.8, 1.1, 1.0),
        )
        for step in range(1, STEPS + 1)
    ]
    run = Run.create(config)
    with EventLog(run.events) as events:
        events.write("restarted", "worker 2 was killed", step=3)
    return run, corpora, reports


def failed(run: Run, corpora: list[Corpus], reports: list[StepReport]) -> list[str]:
    """Promises that do not hold for these reports."""
    twice = [*reports[:5], *reports[3:]]  # steps 4 and 5 were lost with a worker and trained again
    run.telemetry.write_text("".join(f"{item.to_json()}\n" for item in twice))
    return [check.promise for check in checks(run, run.config(), corpora) if not check.holds]


def test_all_checks_hold_for_a_run_that_kept_its_promises(
    good: tuple[Run, list[Corpus], list[StepReport]],
) -> None:
    assert failed(*good) == []


AFTER_A_KILL = "after a worker was killed the run went on where it was, and steps trained again have the same losses"


@pytest.mark.parametrize(
    ("change", "promise"),
    [
        (lambda r: {"committed": r.step != 3}, "steps 1 to 12 were trained, none skipped"),
        (lambda r: {"workers": 4}, "the run went on with another number of workers"),
        (
            lambda r: {"plan": dataclasses.replace(r.plan, ring_sizes={1: 3, 2: 1, 4: 1})},
            "rings of 1, 2, 3, 4 ranks occurred",
        ),
        (
            lambda r: {"plan": dataclasses.replace(r.plan, micro_batches=(2, 2, 2, 2))},
            "ranks ran different numbers of micro-batches in one step",
        ),
        (lambda r: {"loss": 5.3}, "the loss fell by more than 1.0 below ln(vocabulary)"),
        (
            lambda r: {"loss": r.loss + 0.9 * (r.step == STOP_AT + 1) + (STOP_AT < r.step < 10)},
            "the loss is continuous across the resume",
        ),
        (
            lambda r: {"batch": "other" if r.step == 9 else r.batch},
            "the batches are those of an uninterrupted run",
        ),
    ],
)
def test_a_broken_promise_is_found(
    good: tuple[Run, list[Corpus], list[StepReport]],
    change: Callable[[StepReport], dict[str, object]],
    promise: str,
) -> None:
    run, corpora, reports = good
    changed = [dataclasses.replace(item, **change(item)) for item in reports]  # type: ignore[arg-type]
    assert failed(run, corpora, changed) == [promise]


def test_a_repeated_step_with_another_loss_is_found(good: tuple[Run, list[Corpus], list[StepReport]]) -> None:
    run, corpora, reports = good
    assert failed(run, corpora, reports) == []
    with run.telemetry.open("a") as telemetry:
        telemetry.write(dataclasses.replace(reports[-1], loss=reports[-1].loss + 1e-6).to_json() + "\n")
    broken = [check.promise for check in checks(run, run.config(), corpora) if not check.holds]
    assert broken == [AFTER_A_KILL]


def test_a_killed_worker_may_cost_no_step_but_must_have_been_killed(
    good: tuple[Run, list[Corpus], list[StepReport]],
) -> None:
    run, corpora, reports = good
    assert failed(run, corpora, reports) == []
    run.telemetry.write_text("".join(report.to_json() + "\n" for report in reports))  # nothing was trained again
    assert all(check.holds for check in checks(run, run.config(), corpora))
    run.events.write_text("")
    assert [check.promise for check in checks(run, run.config(), corpora) if not check.holds] == [AFTER_A_KILL]
