"""Whole jobs with the real trainer, started as a user starts them."""

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

from evermesh import checkpoint
from evermesh.launcher import Run
from evermesh.launcher.job_file import load_job
from evermesh.runtime.data import Sampler, open_sources
from evermesh.runtime.telemetry import read_telemetry
from tests.launcher.jobs import launched
from tests.launcher.test_cli import evermesh
from tests.processes import still_alive


def test_a_job_trains_stops_and_is_resumed_on_another_number_of_workers(job_file: Path) -> None:
    first = evermesh("launch", job_file, "--set", "train.stop_at=3")
    assert first.returncode == 0, first.stderr
    assert "stopped after step 3 (stop_at); go on with: evermesh resume" in first.stdout
    run = Run.open(job_file.parent / "runs" / "small")
    assert run.status() == "stopped"

    second = evermesh("resume", "--runs", job_file.parent / "runs", "--workers", "3")
    assert second.returncode == 0, second.stderr
    assert "finished: 6 steps" in second.stdout
    assert "2, then 3" in second.stdout

    reports = read_telemetry(run.telemetry)
    assert [(report.step, report.workers) for report in reports] == [(1, 2), (2, 2), (3, 2), (4, 3), (5, 3), (6, 3)]
    data = load_job(job_file).train.data
    sampler = Sampler(open_sources(data), data, seed=0)
    assert [report.batch for report in reports] == [sampler.next_batch().digest for _ in reports]
    assert (run.state().state, run.state().attempt, run.state().workers) == ("finished", 2, 3)
    assert run.config().train.layout.hdp == 3
    assert run.loss_png.stat().st_size > 10_000

    third = evermesh("resume", run.directory)
    assert third.returncode == 2
    assert "run small has finished: 6 of 6 steps. To train it longer, set more steps" in third.stderr

    listed = json.loads(evermesh("runs", "--runs", job_file.parent / "runs", "--json").stdout)
    assert [(row["name"], row["state"], row["step"]) for row in listed] == [("small", "finished", 6)]


def test_a_run_keeps_its_model_and_data_when_it_is_resumed(job_file: Path) -> None:
    Run.create(load_job(job_file))
    found = evermesh("resume", "--runs", job_file.parent / "runs", "--set", "train.model.layers=2")
    assert found.returncode == 2
    assert "train.model cannot change when run small is resumed" in found.stderr


def test_ctrl_c_saves_a_whole_checkpoint_and_leaves_no_process(job_file: Path) -> None:
    with launched(job_file, "train.steps=100000", "train.checkpoint.every=null") as job:
        job.wait_training()
        members = job.processes()
        os.killpg(job.process.pid, signal.SIGINT)  # as a terminal does
        code, stdout, stderr = job.end()
        assert (code, stderr) == (130, "")
        assert "stopping after this step; again to stop at once" in stdout
        assert still_alive(members, 3) == []
        newest = checkpoint.latest(job.run.checkpoints)
        assert newest is not None
        assert checkpoint.verify(newest).ok
        assert job.run.status() == "stopped"
        assert checkpoint.checkpoints(job.run.checkpoints)[-1].step == read_telemetry(job.run.telemetry)[-1].step


def test_a_second_ctrl_c_ends_at_once_and_leaves_no_process(job_file: Path) -> None:
    with launched(job_file, "train.steps=100000", "train.checkpoint.every=null") as job:
        ranks = job.wait_training().ranks
        members = job.processes()
        for rank in ranks:
            psutil.Process(rank.pid).suspend()  # a worker that cannot hear the request to stop
        job.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        job.process.send_signal(signal.SIGINT)
        code, _, stderr = job.end()
        assert code == 130
        assert stderr.startswith("stopped: at once, without a save")
        assert stderr.endswith(
            f"There is no checkpoint yet; start again with: evermesh launch {job.run.directory / 'job.yaml'}\n"
        )
        assert still_alive(members, 3) == []
        assert job.run.status() == "stopped"


def test_a_run_can_be_resumed_only_when_nobody_controls_it_even_if_all_were_killed(job_file: Path) -> None:
    with launched(job_file, "train.steps=100000", "train.checkpoint.every=1") as job:
        job.wait_training()
        refused = evermesh("resume", job.run.directory)
        assert refused.returncode == 2
        assert f"run small is being trained by process {job.run.state().pid}" in refused.stderr
        job.wait_checkpoint()
        members = [psutil.Process(job.process.pid), *job.processes()]
        for member in members:
            with suppress(psutil.NoSuchProcess):
                member.kill()  # whoever lived would start the controller again
        assert still_alive(members, 3) == []
        assert job.run.status() == "died"
    done = checkpoint.checkpoints(job.run.checkpoints)[-1].step
    found = evermesh("resume", job.run.directory, "--set", f"train.steps={done + 2}")
    assert found.returncode == 0, found.stderr
    assert job.run.status() == "finished"


def test_a_killed_worker_is_named_and_the_run_has_failed(job_file: Path) -> None:
    with launched(job_file, "train.steps=100000", "restarts=0") as job:
        job.wait_training()
        members = job.processes()
        job.kill_rank(1)
        code, _, stderr = job.end()
        assert code == 1
        assert "worker 1 was killed by signal 9 (SIGKILL)" in stderr
        assert "go on from there with: evermesh resume" in stderr or "There is no checkpoint yet" in stderr
        assert "Traceback" not in stderr
        assert still_alive(members, 3) == []
        assert job.run.status() == "failed"


def test_a_detached_job_trains_on_after_its_command_has_ended_until_it_is_stopped(job_file: Path) -> None:
    done = evermesh("launch", "--detach", job_file, "--set", "train.steps=100000")
    assert done.returncode == 0, done.stderr
    assert "it is found again with: evermesh status" in done.stdout
    run = Run.open(job_file.parent / "runs" / "small")
    try:
        until = time.monotonic() + 30
        while not run.telemetry.is_file():
            assert time.monotonic() < until
            time.sleep(0.02)
        assert evermesh("status", run.directory).stdout.startswith("small  training")
    finally:
        stopped = evermesh("stop", run.directory)
    assert stopped.returncode == 0, stopped.stderr
    assert run.status() == "stopped"
    assert checkpoint.checkpoints(run.checkpoints)[-1].step == read_telemetry(run.telemetry)[-1].step
