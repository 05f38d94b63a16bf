"""What trackers have been told of runs, read back by their own packages."""

import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from evermesh.fault.events import Event, EventLog, read_events
from evermesh.launcher import Run
from evermesh.launcher.errors import TrackerMissing
from evermesh.launcher.job_file import load_job
from evermesh.launcher.tracking import config as tracker_config
from evermesh.launcher.tracking.config import MlflowConfig, TensorBoardConfig, WandbConfig, check_tracker
from evermesh.launcher.tracking.following import Following
from evermesh.launcher.tracking.values import values_of
from evermesh.runtime.telemetry import read_telemetry
from tests.launcher.jobs import launched
from tests.launcher.reports import step_report
from tests.launcher.test_cli import EVERMESH, evermesh


@pytest.fixture
def run(job_file: Path) -> Run:
    """One that has ended before anybody looks."""
    made = Run.create(load_job(job_file))
    made.write_state(made.state().model_copy(update={"state": "finished"}))
    return made


def train(run: Run, *steps: int, loss: float = 2.0) -> None:
    """Write down these steps as the first rank would, and what happened behind the last one."""
    with run.telemetry.open("a") as file:
        for step in steps:
            file.write(step_report(step, 0.5, loss=loss - 0.1 * step, ended_s=1000.0 + step).to_json() + "\n")
    with EventLog(run.events) as log:
        log.write("failed", f"after step {steps[-1]}", step=steps[-1])


def in_tensorboard(folder: Path) -> EventAccumulator:
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    return read


def told_to_tensorboard(folder: Path, name: str) -> dict[int, float]:
    """Values by step, none of them twice."""
    found = in_tensorboard(folder).Scalars(name)
    assert len({one.step for one in found}) == len(found)
    return {one.step: one.value for one in found}


def expected(run: Run, name: str) -> dict[int, Any]:
    """By what the run itself takes for its steps: those that were trained again with their last values."""
    values = {report.step: values_of(report).get(name) for report in read_telemetry(run.telemetry)}
    return {step: pytest.approx(value) for step, value in values.items() if value is not None}


@pytest.mark.parametrize("is_new_process", [False, True])
def test_steps_that_are_trained_again_replace_those_before_in_tensorboard(run: Run, is_new_process: bool) -> None:
    following = Following(run, TensorBoardConfig())
    train(run, 1, 2, 3, 4, 5)
    assert following.pass_on() == 6
    train(run, 4, 5, 6, loss=9.0)
    if is_new_process:
        following.close()
        following = Following(run, TensorBoardConfig())
    assert following.pass_on() == 4
    assert following.pass_on() == 0
    following.close()
    folder = run.directory / "tensorboard"
    for name in ("train/loss", "speed/tokens_per_s", "plan/fill", "train/skipped"):
        assert told_to_tensorboard(folder, name) == expected(run, name), name
    assert [one.wall_time for one in in_tensorboard(folder).Scalars("train/loss")] == [
        1000.0 + step for step in range(1, 7)
    ]
    assert "events/failed" in in_tensorboard(folder).Tags()["tensors"]


def test_a_command_tells_of_a_run_that_has_ended_once(run: Run, tmp_path: Path) -> None:
    train(run, 1, 2, 3)
    for _ in range(2):
        done = evermesh("track", run.directory, "--place", tmp_path / "board")
        assert done.returncode == 0, done.stderr
    assert told_to_tensorboard(tmp_path / "board", "train/loss") == expected(run, "train/loss")
    assert len(list((tmp_path / "board").iterdir())) == 1


def test_mlflow_has_every_step_and_the_end(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = MlflowConfig(uri=(tmp_path / "mlruns").as_uri(), experiment="llm")
    train(run, 1, 2, 3)
    Following(run, config).pass_on()
    train(run, 3, 4)
    assert Following(run, config).follow(lambda: False), "another process goes on with the same run"
    client = MlflowClient(tracking_uri=config.uri)
    experiment = client.get_experiment_by_name("llm")
    assert experiment is not None
    [found] = client.search_runs([experiment.experiment_id])
    told = client.get_metric_history(found.info.run_id, "train/loss")
    assert {one.step: one.value for one in told} == expected(run, "train/loss")
    assert len(told) == 5, "both values of the step that was trained again"
    assert found.info.status == "FINISHED"
    assert found.data.params["train.layout.tp"] == "1"
    assert not any("path" in name for name in found.data.params)


def test_wandb_has_every_step_in_its_own_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(run, 1, 2, 3)
    assert Following(run, WandbConfig(project="llm", mode="offline")).follow(lambda: False)
    [written] = (run.directory / "wandb").glob("offline-run-*/*.wandb")
    told: dict[int, float] = {}
    for values in _rows(written):
        if "train/loss" in values:
            told[int(values["step"])] = values["train/loss"]
    assert told == expected(run, "train/loss")
    assert list(tmp_path.glob("wandb*")) == []


def _rows(path: Path) -> list[Mapping[str, float]]:
    """What a file of W&B says of steps."""
    rows: list[Mapping[str, float]] = []
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): float(item.value_json) for item in items})
    return rows


def _records(content: bytes) -> Iterator[bytes]:
    """Records of a log in the manner of LevelDB: blocks of 32 KiB, parts with a checksum, a length and a kind; the first
    block begins with 7 bytes about the file."""
    at, whole = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack_from("<IHB", content, at)
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of it, or its end
            yield whole
            whole = b""


class Broken:
    """A tracker whose server is away for a while."""

    key = None
    fails = 2
    told: ClassVar[list[int]] = []

    def step(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        Broken.told.append(step)

    def event(self, step: int, event: Event) -> None:
        pass

    def flush(self) -> None:
        if Broken.fails:
            Broken.fails -= 1
            raise ConnectionError("nobody answers")

    def close(self, state: str) -> None:
        pass


def test_a_tracker_that_fails_is_told_later_and_an_event_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evermesh.launcher.tracking.following.open_tracker", lambda config, run, key: Broken())
    monkeypatch.setattr("evermesh.launcher.tracking.following._FIRST_WAIT_S", 0.01)
    train(run, 1, 2)
    said: list[str] = []
    assert Following(run, TensorBoardConfig(), said.append).follow(lambda: False)
    assert Broken.told == [1, 2] * 3
    assert len(said) == 2
    [event] = [event for event in read_events(run.events) if event.kind == "tracker failed"]
    assert event.text.startswith("the tracker tensorboard failed: ConnectionError: nobody answers.")
    Broken.fails = 100
    train(run, 3)
    assert not Following(run, TensorBoardConfig(), said.append).follow(lambda: False), "it is given up after the end"


def test_a_tracker_that_is_not_installed_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_config, "find_spec", lambda name: None)
    with pytest.raises(TrackerMissing, match=r"pip install 'evermesh\[wandb\]'"):
        check_tracker(WandbConfig())


def test_a_job_tells_tensorboard_while_it_trains_whatever_becomes_of_its_controller(job_file: Path) -> None:
    with launched(job_file, "trackers=[tensorboard]", "train.steps=100000", "train.snapshot.every=4") as job:
        job.wait_training()
        folder = job.run.directory / "tensorboard"
        job.wait(folder.is_dir)
        first = job.run.state().pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        job.wait(lambda: job.run.is_alive() and job.run.state().pid != first)
        seen = len(told_to_tensorboard(folder, "train/loss"))
        job.wait(lambda: len(told_to_tensorboard(folder, "train/loss")) > seen)
        job.process.send_signal(signal.SIGINT)
        code, _, stderr = job.end()
        assert code == 130, stderr
        assert told_to_tensorboard(folder, "train/loss") == expected(job.run, "train/loss")
        assert len(list(folder.iterdir())) == 1, "one process told it all"


def test_the_process_ends_when_it_is_asked_to(run: Run) -> None:
    run.write_state(run.state().model_copy(update={"state": "running"}))
    train(run, 1)
    command = [*EVERMESH, "track", str(run.directory)]
    with subprocess.Popen(command) as process:
        until = time.monotonic() + 60
        while not list((run.directory / "tensorboard").glob("*")) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert told_to_tensorboard(run.directory / "tensorboard", "train/loss") == expected(run, "train/loss")
