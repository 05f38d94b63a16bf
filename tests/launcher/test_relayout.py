"""``evermesh relayout``: a running job goes on with another layout, and nothing restarts."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from evermesh.fault.events import EventLog, read_events
from evermesh.launcher import Run
from evermesh.launcher.controller.work import layout_of_newest
from evermesh.launcher.errors import RelayoutRefused
from evermesh.launcher.job_file import load_job
from evermesh.launcher.relayout import read_changes
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.layout.explain import fields_of
from evermesh.runtime.telemetry import read_telemetry
from tests.checkpoint.states import save_step
from tests.launcher.jobs import Job, clean_losses, launched
from tests.launcher.test_cli import EVERMESH


def _relayout(job: Job, *changes: str) -> subprocess.CompletedProcess[str]:
    command = [*EVERMESH, "relayout", str(job.run.directory), *changes]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_job_moves_while_it_runs_and_stays_there_when_it_fails(job_file: Path) -> None:
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
        job.wait(lambda: len(job.losses) > step)
        assert job.pids == pids, "a rank was started anew"
        job.client.save()
        job.wait_checkpoint()
        job.kill_rank(1)
        job.wait_training(generation=2)
        began_at = next(e.step for e in reversed(list(read_events(job.run.events))) if e.kind == "started")
        assert began_at is not None
        assert began_at > step
        job.wait(lambda: len(job.losses) > began_at)
        job.client.stop(signal.SIGTERM)
        job.end()
        reports = read_telemetry(job.run.telemetry)
    assert {len(report.plan.micro_batches) for report in reports[:step]} == {2}
    assert {len(report.plan.micro_batches) for report in reports[step:]} == {1}
    losses = [report.loss for report in reports][: began_at + 1]
    assert losses == pytest.approx(clean_losses(job_file, 100_000, f"train.stop_at={len(losses)}", *settings), rel=1e-9)


def test_a_restart_has_the_layout_in_which_the_newest_checkpoint_was_written(job_file: Path) -> None:
    config = load_job(job_file)
    run, given, other = Run.create(config), config.train.layout, Layout(tp=2, capacity=320)
    since_s = time.time()
    assert layout_of_newest(run, given, since_s) == given
    with EventLog(run.events) as events:
        events.write("started", "anew", step=0, layout=fields_of(given))
        events.write("layout moved", "to other", step=4, layout=fields_of(other))
        for step in (2, 4):  # that of the step is written before the run moves
            save_step(run.checkpoints, step)
            assert layout_of_newest(run, given, since_s) == given
        save_step(run.checkpoints, 6)
        assert layout_of_newest(run, given, since_s) == other
        events.write("started", "again", step=6, layout=fields_of(given))
        assert layout_of_newest(run, given, since_s) == other
        save_step(run.checkpoints, 8)
        assert layout_of_newest(run, other, since_s) == given
    assert layout_of_newest(run, other, time.time()) == other, "a resume has what it was given"


def test_requests_that_name_no_field_are_refused_before_anybody_is_asked() -> None:
    assert read_changes(["tp=2", "sharding={gradients: all}"]) == {"tp": 2, "sharding": {"gradients": "all"}}
    for wrong in ("tp", "tpp=2", "=2"):
        with pytest.raises(RelayoutRefused, match=f"^{wrong} is not KEY=VALUE"):
            read_changes([wrong])
