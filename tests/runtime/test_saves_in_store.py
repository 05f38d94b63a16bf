"""A run whose checkpoints are in an object store is the run whose checkpoints are in its directory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from evermesh.checkpoint import checkpoints, latest, verify
from evermesh.checkpoint.stores.attempts import folder_of
from evermesh.checkpoint.stores.places import place_of
from evermesh.checkpoint.stores.store import objects_of
from evermesh.runtime import TrainConfig
from evermesh.runtime.config import CheckpointConfig
from evermesh.runtime.model.families import read_model
from evermesh.runtime.trainer import Trainer
from tests.checkpoint.fault_proxy import Weather
from tests.checkpoint.object_store import TestStore, adopt, object_store
from tests.cluster import run_ranks
from tests.runtime.hugging_face import MODELS, make
from tests.runtime.test_trainer import largest_difference, small_config, train_on


@pytest.fixture(scope="module")
def store() -> Iterator[TestStore]:
    with object_store() as found:
        yield found


def _fit(
    rank: int, workers: int, environment: dict[str, str], values: dict[str, Any], directory: Path, resume: bool
) -> dict[str, torch.Tensor]:
    adopt(environment)
    layout = values["layout"] | {"hdp": workers}
    trainer = Trainer(TrainConfig.model_validate(values | {"layout": layout}), directory=directory, resume=resume)
    trainer.fit()
    return {name: parameter.detach().clone() for name, parameter in trainer.built.model.named_parameters()}


def test_a_run_saves_to_a_store_in_bad_weather_and_is_resumed_from_it(
    corpus: Path, tmp_path: Path, store: TestStore
) -> None:
    place = store.place()
    (tmp_path / "there").mkdir()

    def config(stop_at: int, **of_checkpoint: Any) -> dict[str, Any]:
        return small_config(
            corpus, steps=5, stop_at=stop_at, layout={"capacity": 800}, checkpoint={"every": 2} | of_checkpoint
        )

    here = train_on(2, config(5), tmp_path / "here")
    store.proxy.weather = Weather({"503": 0.1, "cut answer": 0.05, "lose answer": 0.05}, seed=3)
    run_ranks(2, _fit, store.environment, config(3, store=str(place)), tmp_path / "there", False)
    assert store.proxy.faults
    store.clear_up()
    assert [found.step for found in checkpoints(place / "there")] == [2, 3]
    assert list((tmp_path / "there").glob("checkpoints")) == []
    resumed = run_ranks(1, _fit, store.environment, config(5, store=str(place)), tmp_path / "there", True)
    assert largest_difference(resumed[0], here) < 1e-12
    ours, theirs = latest(place / "there"), latest(tmp_path / "here" / "checkpoints")
    assert ours is not None
    assert theirs is not None
    assert ours.name == theirs.name
    assert verify(ours).ok
    names = objects_of(place).sizes(folder_of(ours))
    assert {"manifest.json", "rank-00000.index", "rank-00000.safetensors"} == set(names)


@pytest.mark.parametrize("store", ["checkpoints", "s3://user:secret@host/bucket"])
def test_a_store_that_is_no_place_is_refused_at_the_door(store: str) -> None:
    with pytest.raises(ValueError, match=r"neither a URL|leave them to the environment"):
        CheckpointConfig(store=store)


def test_a_run_has_a_folder_of_its_own_in_a_store() -> None:
    config = CheckpointConfig(store="s3://bucket/team/", store_patience_s=7)
    assert str(config.directory(Path("runs/one"))) == "s3://bucket/team/one"
    assert CheckpointConfig().directory(Path("runs/one")) == Path("runs/one/checkpoints")
    assert CheckpointConfig(store="/shared").directory(Path("runs/one")) == Path("/shared/one")


def _model_of_transformers(rank: int, world_size: int, environment: dict[str, str], folder: str) -> Any:
    from tests.runtime.test_own_model import _save_and_load, _train_on_while_saving

    adopt(environment)
    return _train_on_while_saving(rank, world_size, f"{folder}/behind"), _save_and_load(rank, world_size, folder)


@pytest.mark.parity
def test_a_model_of_transformers_is_saved_to_a_store_at_once_and_while_it_trains_on(store: TestStore) -> None:
    place = store.place()
    for behind, (loss_error, errors) in run_ranks(4, _model_of_transformers, store.environment, str(place)):
        assert behind == ([0, 1, 2], 0.0)
        assert loss_error <= 1e-9
        assert max(errors.values()) <= 1e-9, errors
    assert latest(place) == place / "step-00000002"


def test_a_run_starts_from_weights_in_a_store_as_from_a_folder(corpus: Path, tmp_path: Path, store: TestStore) -> None:
    pytest.importorskip("transformers", reason="it writes the weights: pip install 'evermesh[hf]'")
    make(MODELS["qwen3 with windows in some layers"] | {"vocab_size": 413}, tmp_path, torch.bfloat16)
    there = store.place()
    for file in tmp_path.iterdir():
        objects_of(there).put(there / file.name, file.read_bytes())
    values = small_config(corpus, layout={"capacity": 800}, model=read_model(tmp_path).model_dump())
    here, other = (
        Trainer(TrainConfig.model_validate(values | {"init_from": place})).built.model.state_dict()
        for place in (str(tmp_path), str(there))
    )
    assert here.keys() == other.keys()
    assert all(torch.equal(other[name], tensor) for name, tensor in here.items())
    config = TrainConfig.model_validate(values | {"init_from": str(there)})
    assert TrainConfig.model_validate_json(config.model_dump_json()).init_from == place_of(str(there))
    with pytest.raises(ValueError, match="neither a path nor a URL"):
        TrainConfig.model_validate(values | {"init_from": 7})
