"""Training on pipelines and shared experts: the same run as on one worker, stopped and resumed on any layout."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evermesh.runtime import StepReport, TrainConfig, read_telemetry
from evermesh.runtime.trainer import Trainer
from tests.cluster import run_ranks

SIZES = {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 48, "initial_std": 0.1}
BIASED = {"experts": 4, "ffn": 16, "shared_ffn": 16, "router": "sigmoid", "balancing": {"kind": "bias", "rate": 0.01}}
MODELS: dict[str, dict[str, Any]] = {"tied": {"tied_embeddings": True}, "experts": {"moe": BIASED}}
MODELS["experts under LAMB"] = MODELS["experts"]
PIPELINE = {"pp": 2, "hdp": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "pipeline": PIPELINE | {"split": "measured"},
    "no bubbles": {"pp": 2, "schedule": "zero-bubble", "split": [1, 3]},
    "interleaved": PIPELINE | {"schedule": "interleaved-1f1b", "virtual_stages": 2},
    "experts": {"hdp": 2, "tp": 2, "ep": 4, "hot_experts": 1},
    "all": {"pp": 2, "hdp": 2, "tp": 2, "ep": 2, "etp": 2},
    "data": {"hdp": 3},
    "divided": {"hdp": 4, "ep": 2, "sharding": {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"}},
    "three levels": {"pp": 2, "hdp": 4, "sharding": {"parameters": 2, "gradients": 2}},
}


def _config(corpus: Path, model: str, layout: str, **changes: Any) -> TrainConfig:
    degrees = LAYOUTS[layout]
    values: dict[str, Any] = {
        "model": SIZES | MODELS[model],
        "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 512, "batch_tokens": 1700},
        "layout": degrees | {"capacity": 520 // degrees.get("hdp", 1)},
        "optimizer": {"kind": "lamb" if "LAMB" in model else "adamw", "warmup_steps": 2, "clip_norm": 0.1},
        "checkpoint": {"every": None},
        "dtype": "float64",
        "steps": 5,
        "seed": 5,
    }
    return TrainConfig.model_validate(values | changes)


def _fit(rank: int, workers: int, config: TrainConfig, directory: Path, resume: bool) -> list[list[float]]:
    trainer = Trainer(config, directory=directory, resume=resume)
    trainer.fit()
    return trainer.progress.router_biases


def _train(config: TrainConfig, directory: Path, *, resume: bool = False) -> list[StepReport]:
    directory.mkdir(exist_ok=True)
    biases = run_ranks(config.layout.world_size, _fit, config, directory, resume)
    assert all(of_rank == biases[0] for of_rank in biases), "routers of the same layer differ"
    (directory / "biases.json").write_text(json.dumps(biases[0]))
    return read_telemetry(directory / "telemetry.jsonl")


Alone = Callable[[str], tuple[list[StepReport], str]]
"""Reports of every step, and the biases of routers at the end."""


@pytest.fixture(scope="module")
def alone(odd_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Every step of a run that one process makes without a stop, by model."""

    def run(model: str) -> tuple[list[StepReport], str]:
        directory = tmp_path_factory.mktemp("alone")
        return _train(_config(odd_corpus, model, "alone"), directory), (directory / "biases.json").read_text()

    return functools.cache(run)


def _assert_same(reports: list[StepReport], alone: list[StepReport]) -> None:
    assert [report.batch for report in reports] == [report.batch for report in alone]
    assert [report.loss for report in reports] == pytest.approx([report.loss for report in alone], rel=1e-9)
    assert [report.grad_norm for report in reports] == pytest.approx([r.grad_norm for r in alone], rel=1e-9)


@pytest.mark.parametrize(
    ("model", "first", "then"),
    [
        ("tied", "pipeline", "no bubbles"),
        ("experts", "all", "divided"),
        ("experts under LAMB", "divided", "experts"),
        pytest.param("experts", "divided", "interleaved", marks=pytest.mark.parity),
        pytest.param("tied", "three levels", "pipeline", marks=pytest.mark.parity),
        pytest.param("tied", "interleaved", "data", marks=pytest.mark.parity),
        pytest.param("experts", "experts", "pipeline", marks=pytest.mark.parity),
        pytest.param("experts", "data", "all", marks=pytest.mark.parity),
        pytest.param("experts", "alone", "experts", marks=pytest.mark.parity),
    ],
)
def test_a_run_that_is_stopped_and_goes_on_with_another_layout_is_the_run_of_one_worker(
    model: str, first: str, then: str, odd_corpus: Path, alone: Alone, tmp_path: Path
) -> None:
    reports = _train(_config(odd_corpus, model, first, stop_at=3), tmp_path)
    assert all(report.grad_norm > 0.1 for report in reports), "clipping was not at work"
    expected, biases = alone(model)
    _assert_same(_train(_config(odd_corpus, model, then), tmp_path, resume=True), expected)
    assert (tmp_path / "biases.json").read_text() == biases
    assert any(any(of_layer) for of_layer in json.loads(biases)) == model.startswith("experts")
