"""Training with ranks that share a model: the same run as without, stopped and resumed on any layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from evermesh import checkpoint
from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.shard_map import Box
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.runtime import StepReport, TrainConfig, read_telemetry
from evermesh.runtime.trainer import Trainer
from tests.cluster import run_ranks

MODEL = {"hidden": 32, "layers": 2, "heads": 8, "kv_heads": 4, "ffn": 48}
Axes = tuple[int, int]
"""tp and hdp."""
ALONE: Axes = (1, 1)


def _config(corpus: Path, axes: Axes, **changes: Any) -> TrainConfig:
    tp, hdp = axes
    values: dict[str, Any] = {
        "model": MODEL,
        "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 512, "batch_tokens": 1700},
        "layout": {"tp": tp, "hdp": hdp, "capacity": 520 // hdp},
        "optimizer": {"warmup_steps": 2, "clip_norm": 0.1},
        "checkpoint": {"every": None},
        "dtype": "float64",
        "steps": 5,
        "seed": 5,  # one whose plans have all kinds of micro-batches
    }
    return TrainConfig.model_validate(values | changes)


def _fit(rank: int, workers: int, config: TrainConfig, directory: Path, resume: bool) -> int:
    return Trainer(config, directory=directory, resume=resume).fit().step


def _train(config: TrainConfig, directory: Path, *, resume: bool = False) -> list[StepReport]:
    directory.mkdir(exist_ok=True)
    run_ranks(config.layout.world_size, _fit, config, directory, resume)
    return read_telemetry(directory / "telemetry.jsonl")


@pytest.fixture(scope="module")
def alone(odd_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[StepReport]:
    """Every step of a run that one process makes without a stop."""
    return _train(_config(odd_corpus, ALONE), tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def stopped(odd_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on tp 2 x hdp 2 that stopped after step 3."""
    directory = tmp_path_factory.mktemp("stopped")
    _train(_config(odd_corpus, (2, 2), stop_at=3), directory)
    return directory


def _assert_same(reports: list[StepReport], alone: list[StepReport]) -> None:
    assert [report.batch for report in reports] == [report.batch for report in alone]
    assert [report.loss for report in reports] == pytest.approx([report.loss for report in alone], rel=1e-9)
    assert [report.grad_norm for report in reports] == pytest.approx([r.grad_norm for r in alone], rel=1e-9)


def test_losses_and_gradient_norms_equal_those_of_one_worker_under_clipping(
    alone: list[StepReport], stopped: Path
) -> None:
    reports = read_telemetry(stopped / "telemetry.jsonl")
    assert all(report.grad_norm > 0.1 for report in reports), "clipping was not at work"
    assert any(max(report.plan.ring_sizes) == 2 for report in reports)
    assert any(len(set(report.plan.micro_batches)) > 1 for report in reports)
    assert {(report.workers, len(report.plan.micro_batches)) for report in reports} == {(4, 2)}
    _assert_same(reports, alone[:3])


def _whole_state(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read by one process."""
    manifest = read_manifest(path)
    state = {name: torch.full(t.shape, float("nan"), dtype=torch.float64) for name, t in manifest.tensors.items()}
    checkpoint.load(path, {name: (Box((0,) * t.dim(), tuple(t.shape)), t) for name, t in state.items()})
    return state


def _resume_and_save(rank: int, workers: int, config: TrainConfig, source: Path, target: Path) -> dict[str, float]:
    """Load the newest checkpoint of ``source``, save it again below ``target`` as it is, then train to the end."""
    trainer = Trainer(config, directory=source, resume=True)
    trainer.directory = target
    trainer.save()
    trainer.fit()
    return {name: parameter.detach().norm().item() for name, parameter in trainer.built.model.named_parameters()}


def _moved(config: TrainConfig, source: Path, target: Path) -> list[StepReport]:
    target.mkdir()
    run_ranks(config.layout.world_size, _resume_and_save, config, source, target)
    assert _same_state(source / "checkpoints/step-00000003", target / "checkpoints/step-00000003")
    return read_telemetry(target / "telemetry.jsonl")


def _same_state(one: Path, other: Path) -> bool:
    states = _whole_state(one), _whole_state(other)
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("axes", [(1, 3), (4, 1), (1, 1)])
def test_a_checkpoint_loads_bit_equal_on_another_layout_and_the_run_goes_on(
    axes: Axes, odd_corpus: Path, alone: list[StepReport], stopped: Path, tmp_path: Path
) -> None:
    _assert_same(_moved(_config(odd_corpus, axes), stopped, tmp_path / "moved"), alone[3:])


@pytest.mark.parametrize("axes", [(1, 3), pytest.param((4, 1), marks=pytest.mark.parity)])
def test_and_back(axes: Axes, odd_corpus: Path, alone: list[StepReport], tmp_path: Path) -> None:
    _train(_config(odd_corpus, axes, stop_at=3), tmp_path / "first")
    _assert_same(_moved(_config(odd_corpus, (2, 2)), tmp_path / "first", tmp_path / "moved"), alone[3:])


@pytest.mark.parametrize(
    ("model", "tp", "message"),
    [
        ({}, 8, r"layout.tp is 8, which does not divide kv_heads 4\. .* heads 8, kv_heads 4, ffn 48 .* of 1, 2, 4\."),
        ({"ffn": 50}, 4, r"does not divide ffn 50\. .* of 1, 2\."),
        ({}, 3, r"does not divide heads 8 nor kv_heads 4\. "),
    ],
)
def test_degrees_that_do_not_fit_the_model_are_refused(model: dict[str, int], tp: int, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        _config(Path("nowhere"), (tp, 1), model=MODEL | model)
    config = _config(Path("nowhere"), ALONE, model=MODEL | model)
    unchecked = config.model_copy(update={"layout": config.layout.model_copy(update={"tp": tp})})
    with pytest.raises(LayoutDoesNotFit, match=message):  # before it opens its data, or meets anybody
        Trainer(unchecked)
