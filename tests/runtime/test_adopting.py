"""A new run goes on from another library's checkpoint that its configuration names, on another number of workers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from evermesh.checkpoint import CheckpointMismatch
from evermesh.checkpoint.sources import with_prefixes
from evermesh.fault.events import read_events
from evermesh.runtime import TrainConfig
from evermesh.runtime.model.families import written_form
from evermesh.runtime.trainer import Trainer
from tests.cluster import run_ranks
from tests.runtime.saved import newest_tensors
from tests.runtime.test_trainer import _on, small_config


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights and moments after two steps."""
    directory = tmp_path_factory.mktemp("first")
    Trainer(
        TrainConfig.model_validate(small_config(corpus, stop_at=2, layout={"capacity": 600})), directory=directory
    ).fit()
    return newest_tensors(directory / "checkpoints")


def _save_as_torch_does(state: dict[str, Tensor], names: str, config: TrainConfig, directory: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    if names == "hugging_face":
        shapes = {name.partition(".")[2]: t.shape for name, t in state.items() if name.startswith("parameter.")}
        kinds = ("exp_avg.", "exp_avg_sq.", "parameter.")
        naming = with_prefixes(written_form(config.model, shapes)[1], kinds, kinds)
        assert all(len(parts) == 1 for parts in naming.parts.values()), "nothing is fused in this family"
        state = {naming.parts[name][0].name: tensor for name, tensor in state.items()}
    save(state, checkpoint_id=directory, no_dist=True)


def _adopt(rank: int, workers: int, values: dict[str, Any], directory: Path) -> int:
    trainer = Trainer(_on(workers, values), directory=directory)
    trainer.save()
    return trainer.progress.updates


@pytest.mark.parametrize("names", ["own", "hugging_face"])
def test_a_run_on_two_workers_goes_on_with_weights_and_moments(
    names: str, trained: dict[str, Tensor], corpus: Path, tmp_path: Path
) -> None:
    config = TrainConfig.model_validate(small_config(corpus))
    _save_as_torch_does(trained, names, config, tmp_path / "foreign")
    adopt = {"path": str(tmp_path / "foreign"), "names": names, "updates": 2}
    assert run_ranks(2, _adopt, small_config(corpus, adopt=adopt), tmp_path) == [2, 2]
    adopted = newest_tensors(tmp_path / "checkpoints")
    assert adopted.keys() == trained.keys()
    assert all(torch.equal(adopted[name], tensor) for name, tensor in trained.items())
    event = next(event for event in read_events(tmp_path / "events.jsonl") if event.kind == "weights")
    assert event.text.startswith(f"from {tmp_path / 'foreign'}, after 2 updates, ")


def test_what_is_missing_is_named(trained: dict[str, Tensor], corpus: Path, tmp_path: Path) -> None:
    config = TrainConfig.model_validate(small_config(corpus))
    left_out = "exp_avg.embedding.weight"
    _save_as_torch_does({n: t for n, t in trained.items() if n != left_out}, "own", config, tmp_path / "foreign")
    values = small_config(corpus, adopt={"path": str(tmp_path / "foreign"), "updates": 2})
    with pytest.raises(CheckpointMismatch, match=left_out):
        Trainer(TrainConfig.model_validate(values))


def test_weights_come_from_one_place(corpus: Path) -> None:
    with pytest.raises(ValidationError, match=r"gives the weights of there to the run, and adopt those of here"):
        TrainConfig.model_validate(small_config(corpus, adopt={"path": "here"}, init_from="there"))
