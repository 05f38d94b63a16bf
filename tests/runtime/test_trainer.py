"""Training on real ranks: the same run on any number of workers, stopped anywhere."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evermesh.checkpoint import latest
from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.errors import CheckpointNotFound
from evermesh.fault.events import read_events
from evermesh.parallelism.errors import LayoutDoesNotFit, SequenceTooLong
from evermesh.runtime import TrainConfig, read_telemetry
from evermesh.runtime.errors import OtherRun, TrainingDiverged
from evermesh.runtime.micro_batch import LocalBatch
from evermesh.runtime.reporting import Asked
from evermesh.runtime.trainer import Trainer
from tests.cluster import RankFailed, run_ranks

MODEL = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48}


def small_config(corpus: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": MODEL,
        "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 512, "batch_tokens": 1500},
        "layout": {"capacity": 200},
        "optimizer": {"warmup_steps": 2},
        "checkpoint": {"every": 3},
        "dtype": "float64",
        "steps": 8,
    }
    return values | changes


def _on(workers: int, values: dict[str, Any]) -> TrainConfig:
    hdp = workers // values["layout"].get("tp", 1)
    return TrainConfig.model_validate(values | {"layout": values["layout"] | {"hdp": hdp}})


def _fit(rank: int, workers: int, values: dict[str, Any], directory: Path, resume: bool) -> dict[str, torch.Tensor]:
    trainer = Trainer(_on(workers, values), directory=directory, resume=resume)
    trainer.fit()
    return {name: parameter.detach().clone() for name, parameter in trainer.built.model.named_parameters()}


def train_on(workers: int, values: dict[str, Any], directory: Path, *, resume: bool = False) -> dict[str, torch.Tensor]:
    directory.mkdir(exist_ok=True)
    parameters = run_ranks(workers, _fit, values, directory, resume)
    for other in parameters[1:]:
        assert all(torch.equal(other[name], parameters[0][name]) for name in other), "replicas differ"
    return parameters[0]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Eight steps on four workers without a stop."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    return directory, train_on(4, small_config(corpus), directory)


def _batches(directory: Path) -> list[str]:
    return [report.batch for report in read_telemetry(directory / "telemetry.jsonl")]


@pytest.mark.parametrize("workers", [1, 3, 5])
def test_resuming_on_another_number_of_workers_continues_the_same_run(
    workers: int, corpus: Path, uninterrupted: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    layout = {"capacity": 600 if workers == 1 else 200}
    train_on(4, small_config(corpus, stop_at=5), tmp_path)
    resumed = train_on(workers, small_config(corpus, layout=layout), tmp_path, resume=True)
    assert _batches(tmp_path) == _batches(uninterrupted[0])
    assert largest_difference(resumed, uninterrupted[1]) <= 1e-9


def test_resuming_on_the_same_workers_is_bit_for_bit_the_same(
    corpus: Path, uninterrupted: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    train_on(4, small_config(corpus, stop_at=5), tmp_path)
    assert largest_difference(train_on(4, small_config(corpus), tmp_path, resume=True), uninterrupted[1]) == 0.0


def test_losses_equal_those_of_one_worker(
    corpus: Path, uninterrupted: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    train_on(1, small_config(corpus, layout={"capacity": 600}), tmp_path)
    alone, together = (read_telemetry(folder / "telemetry.jsonl") for folder in (tmp_path, uninterrupted[0]))
    assert [report.loss for report in together] == pytest.approx([report.loss for report in alone], rel=1e-9)
    assert [report.num_tokens for report in together] == [report.num_tokens for report in alone]


def test_telemetry_tells_rings_micro_batches_and_bytes(uninterrupted: tuple[Path, dict[str, torch.Tensor]]) -> None:
    reports = read_telemetry(uninterrupted[0] / "telemetry.jsonl")
    sizes = {size for report in reports for size in report.plan.ring_sizes}
    assert sizes >= {1, 2, 3}
    assert any(len(set(report.plan.micro_batches)) > 1 for report in reports)
    elements = sum(parameter.numel() for parameter in uninterrupted[1].values())
    padded = -(-elements // 4) * 4
    for report in reports:
        assert report.bytes_by_site["gradients"] == 4 * padded * 8
        assert report.bytes_by_site["parameters"] == padded * 8
        assert (report.bytes_by_site["ring forward"] > 0) == (max(report.plan.ring_sizes) > 1)


def _groups_over_time(rank: int, workers: int, values: dict[str, Any]) -> set[int]:
    """Process groups that exist after every step."""
    from torch.distributed import distributed_c10d

    trainer = Trainer(_on(workers, values))
    step, seen = trainer.train_step, set()

    def train_step(batch: Any) -> Any:
        outcome = step(batch)
        seen.add(len(distributed_c10d._world.pg_map))
        return outcome

    trainer.train_step = train_step  # type: ignore[method-assign]
    trainer.fit()
    return seen


@pytest.mark.parametrize(("workers", "tp", "groups"), [(3, 1, 3), (4, 2, 6)])
def test_no_process_group_is_made_per_batch(workers: int, tp: int, groups: int, corpus: Path) -> None:
    values = small_config(corpus, layout={"capacity": 300, "tp": tp}, steps=4)
    assert run_ranks(workers, _groups_over_time, values) == [{groups}] * workers


def test_events_tell_the_story(uninterrupted: tuple[Path, dict[str, torch.Tensor]]) -> None:
    events = [(event.kind, event.step) for event in read_events(uninterrupted[0] / "events.jsonl")]
    assert events == [
        ("started", 0),
        ("memory", 0),
        ("checkpoint", 3),
        ("checkpoint", 6),
        ("checkpoint", 8),
        ("finished", 8),
    ]


def test_training_lowers_the_loss(corpus: Path, tmp_path: Path) -> None:
    config = _on(1, small_config(corpus, layout={"capacity": 600}, steps=30, dtype="float32"))
    Trainer(config, directory=tmp_path).fit()
    reports = read_telemetry(tmp_path / "telemetry.jsonl")
    assert reports[-1].loss < reports[0].loss - 1.0


def test_a_run_in_bfloat16_follows_that_in_float64_and_keeps_float32_masters(corpus: Path, tmp_path: Path) -> None:
    """Two workers, many micro-batches: activations and parameters of 8 bits, everything that adds up in more."""
    layout = {"capacity": 260, "sharding": {"gradients": "all"}}
    for dtype in ("bfloat16", "float64"):
        values = small_config(corpus, dtype=dtype, layout=layout, optimizer={"lr": 3e-3})
        train_on(2, values, tmp_path / dtype)
    losses = {
        dtype: [report.loss for report in read_telemetry(tmp_path / dtype / "telemetry.jsonl")]
        for dtype in ("bfloat16", "float64")
    }
    assert losses["bfloat16"] == pytest.approx(losses["float64"], rel=1e-2)
    assert losses["bfloat16"][-1] < losses["bfloat16"][0] - 0.05
    manifest = read_manifest(latest(tmp_path / "bfloat16" / "checkpoints") or tmp_path)
    assert {tensor.dtype for tensor in manifest.tensors.values()} == {"float32"}


def test_asked_to_stop_it_saves_and_a_resume_goes_on(corpus: Path, tmp_path: Path) -> None:
    config = _on(1, small_config(corpus, layout={"capacity": 600}))
    answers: Iterator[Asked | None] = iter([None, "stop"])
    result = Trainer(config, directory=tmp_path, asked=lambda: next(answers)).fit()
    assert (result.step, result.reason) == (2, "asked")
    assert result.checkpoint is not None
    assert Trainer(config, directory=tmp_path, resume=True).fit().step == 8
    assert len(_batches(tmp_path)) == 8


def _poisoned(rank: int, workers: int, values: dict[str, Any], bad_steps: set[int]) -> list[tuple[bool, int]]:
    """Ranks train with a gradient that is not a number on rank 1 alone; committed and updates of every step."""
    trainer = Trainer(_on(workers, values))
    run, outcomes = trainer.runner.accumulate, []

    def accumulate(batch: LocalBatch) -> Any:
        loss = run(batch)
        if rank == 1 and trainer.progress.step in bad_steps:
            trainer.built.sets[0].gradients[0] = float("nan")
        return loss

    step = trainer.train_step

    def train_step(batch: Any) -> Any:
        outcome = step(batch)
        outcomes.append((outcome.committed, trainer.progress.updates))
        return outcome

    trainer.runner.accumulate, trainer.train_step = accumulate, train_step  # type: ignore[method-assign]
    trainer.fit()
    assert torch.isfinite(trainer.built.sets[0].owned_values).all()
    return outcomes


@pytest.mark.parametrize("layout", [{"capacity": 300}, {"capacity": 600, "tp": 2}])
def test_gradient_that_is_not_a_number_on_one_rank_is_skipped_by_all(layout: dict[str, int], corpus: Path) -> None:
    outcomes = run_ranks(2, _poisoned, small_config(corpus, layout=layout, steps=4), {2})
    assert outcomes == [[(True, 1), (False, 1), (True, 2), (True, 3)]] * 2


def test_too_many_bad_steps_in_a_row_end_the_run(corpus: Path) -> None:
    values = small_config(corpus, layout={"capacity": 300}, steps=6, max_skipped_steps=3)
    with pytest.raises(RankFailed, match="TrainingDiverged: the last 3 steps, up to step 4"):
        run_ranks(2, _poisoned, values, {2, 3, 4})
    assert issubclass(TrainingDiverged, ArithmeticError)


def test_checkpoint_of_another_model_is_refused_by_name(corpus: Path, tmp_path: Path) -> None:
    values = small_config(corpus, layout={"capacity": 600}, stop_at=1)
    Trainer(_on(1, values), directory=tmp_path).fit()
    other = _on(1, values | {"model": MODEL | {"ffn": 64}})
    with pytest.raises(OtherRun, match=r"model was .*'ffn': 48.* and is now .*'ffn': 64"):
        Trainer(other, directory=tmp_path, resume=True)


def test_resuming_without_a_checkpoint_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFound, match="no complete checkpoint"):
        Trainer(_on(1, small_config(corpus)), directory=tmp_path, resume=True)


def test_layouts_that_cannot_run_are_refused(corpus: Path) -> None:
    with pytest.raises(LayoutDoesNotFit, match="hdp 3 x tp 1 = 3 ranks, but 1 were started"):
        Trainer(_on(3, small_config(corpus)))
    with pytest.raises(LayoutDoesNotFit, match="pp 2 x hdp 1 x tp 1 = 2 ranks, but 1 were started"):
        Trainer(_on(1, small_config(corpus, layout={"pp": 2})))


def test_sequence_that_fits_no_ring_ends_the_run_with_its_numbers(corpus: Path) -> None:
    with pytest.raises(SequenceTooLong, match=r"a capacity of 20 tokens hold 20"):
        Trainer(_on(1, small_config(corpus, layout={"capacity": 20}))).fit()
