"""Checkpoints of a run: written while it goes on, with the same bytes; what fails behind its back ends it, on all ranks."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from evermesh.checkpoint import CheckpointNotSaved, HostMemoryShort, checkpoints, latest
from evermesh.checkpoint.background import memory
from evermesh.fault.events import read_events
from evermesh.runtime import TrainConfig, read_telemetry
from evermesh.runtime.errors import TrainingDiverged
from evermesh.runtime.trainer import Trainer
from tests.cluster import run_ranks
from tests.runtime.test_trainer import largest_difference, small_config, train_on


def _config(corpus: Path, **of_checkpoint: Any) -> dict[str, Any]:
    return small_config(corpus, checkpoint={"every": 2} | of_checkpoint, layout={"capacity": 300}, steps=5)


def _files(directory: Path) -> dict[str, bytes]:
    path = latest(directory / "checkpoints")
    assert path is not None
    files = (file for kind in ("safetensors", "xor") for file in path.glob(f"*.{kind}"))
    return {file.name: file.read_bytes() for file in files}


def test_a_run_that_goes_on_while_it_saves_is_the_same_run(corpus: Path, tmp_path: Path) -> None:
    behind = train_on(2, _config(corpus, keep=9, parity=2, asynchronous=True), tmp_path / "behind")
    standing = train_on(2, _config(corpus, keep=9, parity=2, asynchronous=False), tmp_path / "standing")
    assert largest_difference(behind, standing) == 0.0
    assert _files(tmp_path / "behind") == _files(tmp_path / "standing")
    for directory in (tmp_path / "behind", tmp_path / "standing"):
        assert [found.step for found in checkpoints(directory / "checkpoints")] == [2, 4, 5]
        told = [event for event in read_events(directory / "events.jsonl") if event.kind == "checkpoint"]
        assert [event.step for event in told] == [2, 4, 5]
        assert [event.fields["bytes_written"] for event in told if event.fields["write_s"]]
        reports = read_telemetry(directory / "telemetry.jsonl")
        assert [report.checkpoint_stop_s > 0 for report in reports] == [False, False, True, False, True]
        assert sum(report.checkpoint_write_s for report in reports) > 0
    path = latest(tmp_path / "behind" / "checkpoints")
    assert path is not None
    for lost in path.glob("rank-00001*"):  # parity makes up for it
        lost.unlink()
    resumed = train_on(
        1, _config(corpus, asynchronous=True) | {"layout": {"capacity": 600}}, tmp_path / "behind", resume=True
    )
    assert largest_difference(resumed, behind) == 0.0


def _lose_a_writer(rank: int, workers: int, values: dict[str, Any], directory: Path) -> str:
    config = TrainConfig.model_validate(values | {"layout": values["layout"] | {"hdp": workers}})
    trainer = Trainer(config, directory=directory)
    step = trainer.train_step

    def train_step(batch: Any) -> Any:
        saver = trainer.saves._saver
        if rank == 1 and trainer.progress.step == 1 and saver is not None and saver._writer is not None:
            os.kill(saver._writer.pid, signal.SIGSTOP)
        if rank == 1 and trainer.progress.step == 2 and saver is not None and saver._writer is not None:
            os.kill(saver._writer.pid, signal.SIGKILL)
            while saver.look():
                time.sleep(0.01)
        return step(batch)

    trainer.train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(CheckpointNotSaved) as caught:
        trainer.fit()
    assert trainer.progress.step == 3
    return str(caught.value)


def test_a_writer_that_dies_ends_the_run_in_the_next_step_on_all_ranks(corpus: Path, tmp_path: Path) -> None:
    for told in run_ranks(2, _lose_a_writer, _config(corpus), tmp_path):
        assert "the checkpoint of step 2 was not saved" in told
        assert "killed by signal 9" in told
    assert list((tmp_path / "checkpoints").iterdir()) == []


def _diverge(rank: int, workers: int, values: dict[str, Any], directory: Path) -> None:
    config = TrainConfig.model_validate(
        values | {"layout": values["layout"] | {"hdp": workers}, "max_skipped_steps": 1}
    )
    trainer = Trainer(config, directory=directory)
    step = trainer.train_step

    def train_step(batch: Any) -> Any:
        if trainer.progress.step == 2:
            for parameter in trainer.built.model.parameters():
                parameter.data.fill_(float("nan"))
        return step(batch)

    trainer.train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(TrainingDiverged):
        trainer.fit()


def test_a_run_that_ends_with_an_error_first_commits_what_it_was_saving(corpus: Path, tmp_path: Path) -> None:
    run_ranks(2, _diverge, _config(corpus), tmp_path)
    assert [found.step for found in checkpoints(tmp_path / "checkpoints")] == [2]
    assert [event.step for event in read_events(tmp_path / "events.jsonl") if event.kind == "checkpoint"] == [2]


def _without_room(rank: int, workers: int, values: dict[str, Any], directory: Path) -> None:
    memory.available_bytes = lambda: (1 << 10, 1 << 30)
    Trainer(TrainConfig.model_validate(values), directory=directory).fit()


def test_without_room_for_the_copy_training_stands_still_unless_that_was_ruled_out(
    corpus: Path, tmp_path: Path
) -> None:
    values = _config(corpus) | {"layout": {"capacity": 600}}
    run_ranks(1, _without_room, values, tmp_path)
    told = [event.text for event in read_events(tmp_path / "events.jsonl") if event.kind == "memory"]
    assert told[-1].startswith("training stands still while a checkpoint is written: saving in the background needs")
    assert [found.step for found in checkpoints(tmp_path / "checkpoints")] == [4, 5]
    with pytest.raises(AssertionError, match=HostMemoryShort.__name__):
        run_ranks(1, _without_room, values | {"checkpoint": {"every": 2, "asynchronous": True}}, tmp_path)
