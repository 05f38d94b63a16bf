"""Two runs with one configuration: the same bits, and a digest that tells."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from evermesh.fault.events import read_events
from evermesh.runtime import TrainConfig
from evermesh.runtime.determinism import ENVIRONMENT, prepare_environment
from evermesh.runtime.trainer import Trainer
from tests.cluster import run_ranks

MOE = {"experts": 4, "ffn": 16, "shared_ffn": 16, "balancing": {"kind": "bias", "rate": 0.01}}


def _config(corpus: Path, layout: dict[str, int], **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model": {
            "hidden": 32,
            "layers": 2,
            "heads": 4,
            "kv_heads": 2,
            "ffn": 48,
            "moe": MOE if "ep" in layout else None,
        },
        "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 512, "batch_tokens": 1500},
        "layout": layout | {"capacity": 300},
        "checkpoint": {"every": None},
        "deterministic": True,
        "steps": 3,
    }
    return TrainConfig.model_validate(values | changes)


def _fit(
    rank: int, workers: int, config: TrainConfig, directory: Path | None, nudged: int | None
) -> tuple[bool, bytes]:
    """Whether torch is bound to deterministic algorithms, and all bits of this rank's parameters. Rank ``nudged`` changes
    the last bit of one of its own before the run."""
    trainer = Trainer(config, directory=directory)
    if rank == nudged:
        weights = trainer.optimizer.shards[0].master
        weights[0] = torch.nextafter(weights[0], torch.tensor(torch.inf))
    trainer.fit()
    bits = b"".join(parameter.detach().numpy().tobytes() for parameter in trainer.built.model.parameters())
    return torch.are_deterministic_algorithms_enabled(), bits


def _run(config: TrainConfig, directory: Path, nudged: int | None = None) -> tuple[list[bytes], str]:
    """The parameters of every rank, and the digest that the run told."""
    directory.mkdir()
    results = run_ranks(config.layout.world_size, _fit, config, directory, nudged)
    assert {deterministic for deterministic, _ in results} == {config.deterministic}
    last = list(read_events(directory / "events.jsonl"))[-1]
    assert last.kind == "finished"
    return [bits for _, bits in results], last.text.split("parameters ")[1]


@pytest.mark.parametrize("layout", [{"hdp": 2, "tp": 2}, {"pp": 2, "hdp": 2, "ep": 2}])
def test_two_runs_have_the_same_bits_and_the_same_digest(layout: dict[str, int], corpus: Path, tmp_path: Path) -> None:
    config = _config(corpus, layout)
    first, second = (_run(config, tmp_path / name) for name in ("first", "second"))
    assert first == second


def test_one_bit_on_one_rank_changes_the_digest(corpus: Path, tmp_path: Path) -> None:
    config = _config(corpus, {"hdp": 2}, deterministic=False, optimizer={"lr": 1e-30, "weight_decay": 0.0}, steps=1)
    (_, same), (_, other) = (_run(config, tmp_path / str(nudged), nudged) for nudged in (None, 1))
    assert same != other
    assert len(same) == len(other) == 32


def test_what_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    assert prepare_environment() == ENVIRONMENT | {"NCCL_ALGO": "Tree"}
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
