"""``evermesh relayout``: a running job goes on with another layout, and nothing restarts."""

import signal
import subprocess
from pathlib import Path

import pytest

from evermesh.fault.events import read_events
from evermesh.launcher.errors import RelayoutRefused
from evermesh.launcher.relayout import read_changes
from evermesh.runtime.telemetry import read_telemetry
from tests.launcher.jobs import Job, clean_losses, launched
from tests.launcher.test_cli import EVERMESH


def _relayout(job: Job, *changes: str) -> subprocess.CompletedProcess[str]:
    command = [*EVERMESH, "relayout", str(job.run.directory), *changes]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_job_moves_while_it_runs_and_its_losses_are_those_of_one_that_stays(job_file: Path) -> None:
    settings = ("train.dtype=float64", "train.checkpoint.every=null", "train.model.kv_heads=2")
    with launched(job_file, "train.steps=100000", *settings) as job:
        job.wait_training()
        pids = job.pids
        moved = _relayout(job, "tp=2", "capacity=320")
        assert moved.returncode == 0, moved.stderr
        assert "from pp 1 x hdp 2 x tp 1 to pp 1 x hdp 1 x tp 2" in moved.stdout
        refused = _relayout(job, "tp=4")
        assert refused.returncode == 2
        assert "small goes on as it is: as asked: " in refused.stderr
        (event,) = [event for event in read_events(job.run.events) if event.kind == "layout moved"]
        step = int(str(event.step))
        job.wait(lambda: len(job.losses) >= step + 3)
        assert job.pids == pids, "a rank was started anew"
        job.client.stop(signal.SIGTERM)
        job.end()
        reports = read_telemetry(job.run.telemetry)
    assert {len(report.plan.micro_batches) for report in reports[:step]} == {2}
    assert {len(report.plan.micro_batches) for report in reports[step:]} == {1}
    losses = [report.loss for report in reports][: step + 3]
    assert losses == pytest.approx(clean_losses(job_file, 100_000, f"train.stop_at={len(losses)}", *settings), rel=1e-9)


def test_requests_that_name_no_field_are_refused_before_anybody_is_asked() -> None:
    assert read_changes(["tp=2", "sharding={gradients: all}"]) == {"tp": 2, "sharding": {"gradients": "all"}}
    for wrong in ("tp", "tpp=2", "=2"):
        with pytest.raises(RelayoutRefused, match=f"^{wrong} is not KEY=VALUE"):
            read_changes([wrong])
