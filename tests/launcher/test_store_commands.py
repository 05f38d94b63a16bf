"""What ``evermesh checkpoint`` does with the URL of an object store, and what a launch refuses there."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from evermesh.checkpoint.errors import StoreUnusable
from evermesh.checkpoint.stores.places import ObjectPath
from evermesh.checkpoint.stores.store import objects_of
from evermesh.launcher.admission import check_store
from evermesh.launcher.commands.checkpoint import app
from evermesh.launcher.config import JobConfig
from evermesh.launcher.errors import RunUnusable
from evermesh.launcher.run_directory import Run
from evermesh.parallelism.errors import EvermeshError
from evermesh.runtime.config import CheckpointConfig
from tests.checkpoint.fault_proxy import Weather
from tests.checkpoint.object_store import TestStore, object_store
from tests.checkpoint.states import save_step


@pytest.fixture(scope="module")
def store() -> Iterator[TestStore]:
    with object_store() as found:
        yield found


@pytest.fixture
def place(store: TestStore) -> ObjectPath:
    place = store.place()
    for step in (5, 10, 15):
        save_step(place, step, keep=None)
    return place


def _told(*command: str) -> str:
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    return done.output


def test_checkpoints_at_a_url_are_listed_shown_verified_and_pruned(place: ObjectPath) -> None:
    rows = json.loads(_told("ls", str(place), "--json"))
    assert [(row["step"], row["latest"]) for row in rows] == [(5, False), (10, False), (15, True)]
    assert rows[0]["path"] == f"{place}/step-00000005"
    assert "step-00000010" in _told("ls", str(place))
    assert json.loads(_told("show", str(place), "--json"))["step"] == 15
    assert json.loads(_told("show", f"{place}/step-00000005", "--json"))["step"] == 5
    assert json.loads(_told("verify", f"{place}/step-00000005", "--json"))["ok"]
    assert "would remove 2 checkpoints" in _told("prune", str(place), "--keep-last", "1")
    assert "removed 2 checkpoints" in _told("prune", str(place), "--keep-last", "1", "--yes")
    assert [row["step"] for row in json.loads(_told("ls", str(place), "--json"))] == [15]


def _run(directory: Path, place: ObjectPath, name: str) -> Run:
    train = {
        "checkpoint": {"store": str(place), "store_patience_s": 1.0},
        "data": {"sources": [{"kind": "corpus", "path": "nowhere"}], "context": 256, "batch_tokens": 1024},
    }
    return Run.create(JobConfig.model_validate({"name": name, "runs": str(directory), "train": train}))


def test_a_new_run_is_refused_where_another_of_its_name_has_checkpoints_or_nobody_answers(
    store: TestStore, place: ObjectPath, tmp_path: Path
) -> None:
    check_store(_run(tmp_path, place.parent, "other"))
    run = _run(tmp_path, place.parent, "run")
    assert str(run.checkpoints) == str(place)
    with pytest.raises(RunUnusable, match=f"{place}/step-00000015 is a checkpoint of another run of the name run"):
        check_store(run)
    store.proxy.weather = Weather(choose=lambda *_: "503")
    try:
        with pytest.raises(StoreUnusable, match="tried"):
            check_store(_run(tmp_path, place.parent, "third"))
    finally:
        store.clear_up()


def test_checkpoints_at_a_url_are_compared_extracted_planned_and_converted(place: ObjectPath, tmp_path: Path) -> None:
    step, other = f"{place}/step-00000010", save_step(tmp_path, 10)
    assert _told("diff", step, str(other)).splitlines()[-1].startswith("the same")
    plan = [json.loads(_told("plan-load", one, "--ranks", "3", "--json"))["ranks"] for one in (step, str(other))]
    assert plan[0] == plan[1]
    files: list[Path] = []
    for one in (step, str(other)):
        files.append(tmp_path / f"{len(files)}.safetensors")
        _told("extract", one, str(files[-1]), "--tensor", "model.*")
    assert files[0].read_bytes() == files[1].read_bytes()
    _told("convert", step, str(tmp_path / "foreign"), "--to", "torch-distributed")
    _told("convert", str(tmp_path / "foreign"), f"{place}/back", "--to", "evermesh", "--step", "10")
    assert _told("diff", f"{place}/back", str(other), "--no-objects").splitlines()[-1].startswith("the same")


def test_what_is_written_to_file_systems_only_is_refused_at_a_url(store: TestStore, place: ObjectPath) -> None:
    before = objects_of(place).sizes(place)
    for command, fact in (
        (("repair", str(place)), "the store keeps every object in several places itself"),
        (("extract", str(place), f"{place}/x.npy", "--tensor", "model.embed"), "written to file systems only"),
        (("export", str(place), f"{place}/model"), "in an object store"),
        (("convert", str(place), f"{place}/dcp", "--to", "torch-distributed"), "written to file systems only"),
    ):
        refused = CliRunner().invoke(app, command).exception
        assert isinstance(refused, EvermeshError), command
        assert fact in str(refused)
    assert objects_of(place).sizes(place) == before
    with pytest.raises(ValidationError, match="parity is 2, but store is an object store"):
        CheckpointConfig(store=str(place), parity=2)
