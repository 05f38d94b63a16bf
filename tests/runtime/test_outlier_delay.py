"""Training with outliers that wait: the same run on any number of workers, stopped anywhere."""

from pathlib import Path

import pytest

from evermesh.runtime import read_telemetry
from evermesh.runtime.data import DataConfig, Sampler, open_sources
from tests.runtime.test_trainer import largest_difference, small_config, train_on

MOST_STEPS = 4
DELAY = {"thresholds": [150, 300], "together": 3, "most_steps": MOST_STEPS}


def test_a_run_stopped_on_two_workers_while_outliers_wait_goes_on_on_one_as_if_nothing_had_been(
    corpus: Path, tmp_path: Path
) -> None:
    values = small_config(corpus)
    values["data"] |= {"outlier_delay": DELAY}
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    expected = train_on(1, values | {"layout": {"capacity": 512}}, alone)
    train_on(2, values | {"layout": {"capacity": 300}, "stop_at": 5}, moved)
    stopped_at = read_telemetry(moved / "telemetry.jsonl")[-1]
    assert (stopped_at.step, stopped_at.num_waiting > 0) == (5, True), "nothing waited; this would prove nothing"
    found = train_on(1, values | {"layout": {"capacity": 512}}, moved, resume=True)

    reports, others = (read_telemetry(folder / "telemetry.jsonl") for folder in (alone, moved))
    assert [report.batch for report in reports] == [report.batch for report in others]
    assert [report.loss for report in reports] == pytest.approx([report.loss for report in others], rel=1e-9)
    assert largest_difference(expected, found) < 1e-9

    sampler = Sampler(open_sources(data := DataConfig.model_validate(values["data"])), data, 0)
    for report in reports:
        batch = sampler.next_batch(ends=report.step == report.steps)
        told = (report.batch, report.mean_steps_late, report.most_steps_late, report.num_waiting)
        assert told == (batch.digest, batch.mean_steps_late, batch.most_steps_late, batch.num_waiting)
    assert reports[-1].num_waiting == 0
    assert 0 < max(report.most_steps_late for report in reports) <= MOST_STEPS
