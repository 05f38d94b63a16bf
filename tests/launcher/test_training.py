"""Whole jobs with the real trainer, started as a user starts them."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from evermesh import checkpoint
from evermesh.fault.events import read_events
from evermesh.launcher import Run
from evermesh.launcher.job_file import load_job
from evermesh.runtime.data import Sampler, open_sources
from evermesh.runtime.telemetry import read_telemetry
from tests.launcher.test_cli import EVERMESH, evermesh

WAIT_S = 60.0


@contextmanager
def training(job_file: Path, *overrides: str) -> Iterator[tuple[subprocess.Popen[str], Run]]:
    """``evermesh launch`` in a process group of its own, after its first step."""
    command = [*EVERMESH, "launch", str(job_file), *(part for value in overrides for part in ("--set", value))]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        run = Run(job_file.parent / "runs" / "small")
        until = time.monotonic() + WAIT_S
        try:
            while not run.telemetry.is_file() and process.poll() is None:
                assert time.monotonic() < until, "no step in time"
                time.sleep(0.02)
            yield process, run
        finally:
            process.kill()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The process and everything it started."""
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


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
    with training(job_file, "train.steps=100000", "train.checkpoint.every=null") as (process, run):
        members = family(process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: launcher, fork server and workers get it
        stdout, stderr = process.communicate(timeout=WAIT_S)
        assert process.returncode == 130
        assert "stopping after this step; again to stop at once" in stdout
        assert stderr == ""
        assert psutil.wait_procs(members, timeout=3)[1] == []
        newest = checkpoint.latest(run.checkpoints)
        assert newest is not None
        assert checkpoint.verify(newest).ok
        assert run.status() == "stopped"
        assert checkpoint.checkpoints(run.checkpoints)[-1].step == read_telemetry(run.telemetry)[-1].step


def test_a_second_ctrl_c_ends_at_once_and_leaves_no_process(job_file: Path) -> None:
    with training(job_file, "train.steps=100000") as (process, run):
        members = family(process)
        for member in members[1:]:
            if member.name().startswith("python") and member.parent() != members[0]:
                member.suspend()  # a worker that cannot hear the request to stop
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=WAIT_S)
        assert process.returncode == 130
        assert stderr == (
            "stopped: at once, without a save. There is no checkpoint yet; start again with: "
            f"evermesh launch {run.directory / 'job.yaml'}\n"
        )
        assert psutil.wait_procs(members, timeout=3)[1] == []
        assert run.status() == "stopped"


def test_a_run_can_be_resumed_only_after_its_launcher_is_gone_even_if_that_was_killed(job_file: Path) -> None:
    with training(job_file, "train.steps=100000", "train.checkpoint.every=1") as (process, run):
        members = family(process)
        refused = evermesh("resume", run.directory)
        assert refused.returncode == 2
        assert f"run small is being trained by process {process.pid}" in refused.stderr
        while checkpoint.latest(run.checkpoints) is None:
            time.sleep(0.02)
        process.kill()
        assert psutil.wait_procs(members, timeout=3)[1] == []
        assert run.status() == "died"
    done = checkpoint.checkpoints(run.checkpoints)[-1].step
    found = evermesh("resume", run.directory, "--set", f"train.steps={done + 2}")
    assert found.returncode == 0, found.stderr
    assert run.status() == "finished"


def test_after_a_worker_was_killed_the_run_goes_on_and_ends_with_the_losses_of_a_clean_run(job_file: Path) -> None:
    assert evermesh("launch", job_file, "--name", "clean", "--set", "train.steps=400").returncode == 0
    with training(job_file, "train.steps=400") as (process, run):
        while checkpoint.latest(run.checkpoints) is None:
            time.sleep(0.01)
        members = family(process)
        workers = [member for member in members if member.parent() != members[0] and member != members[0]]
        workers[1].kill()
        stdout, stderr = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, stderr
    assert "killed by signal 9 (SIGKILL)" in stdout
    assert "Going on from step" in stdout
    assert "(restart 1 of 3)" in stdout
    clean = read_telemetry(run.directory.with_name("clean") / "telemetry.jsonl")
    assert [report.loss for report in read_telemetry(run.telemetry)] == [report.loss for report in clean]
    assert {"failed", "restarted", "resumed"} <= {event.kind for event in read_events(run.events)}
    assert run.state().attempt == 2


def test_a_killed_worker_is_named_and_the_run_has_failed(job_file: Path) -> None:
    with training(job_file, "train.steps=100000", "restarts=0") as (process, run):
        members = family(process)
        workers = [member for member in members if member.parent() != members[0] and member != members[0]]
        workers[1].kill()
        _, stderr = process.communicate(timeout=WAIT_S)
        assert process.returncode == 1
        assert "was killed by signal 9 (SIGKILL)" in stderr
        assert "Traceback" not in stderr
        assert psutil.wait_procs(members, timeout=3)[1] == []
        assert run.status() == "failed"
