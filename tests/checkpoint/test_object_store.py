"""Checkpoints in an object store are those of a directory, bit for bit, in any weather; real S3 was never asked."""

import json
import time
from pathlib import Path

import pytest
import torch

from evermesh import checkpoint
from evermesh.checkpoint import (
    Box,
    CheckpointCorrupt,
    CheckpointNotFound,
    CheckpointNotSaved,
    ParityUnusable,
    Retention,
    Shard,
    ShardMap,
    TensorShards,
)
from evermesh.checkpoint.errors import StoreRefused, StoreUnusable
from evermesh.checkpoint.files import CHUNK_BYTES
from evermesh.checkpoint.stores.attempts import folder_of
from evermesh.checkpoint.stores.places import ObjectPath, place_of
from evermesh.checkpoint.stores.store import objects_of
from tests.checkpoint.fault_proxy import Fault, Weather
from tests.checkpoint.object_store import TestStore
from tests.checkpoint.states import load_and_compare, save_step

BAD_WEATHER: dict[Fault, float] = {
    "503": 0.08,
    "cut answer": 0.06,
    "cut request": 0.06,
    "lose answer": 0.06,
    "delay": 0.04,
}


def _manifest(payload: bytes) -> dict[str, object]:
    return {key: value for key, value in json.loads(payload).items() if key not in ("xxh3_64", "time_s")}


def test_it_has_the_bytes_of_one_in_a_directory_and_loads_into_any_topology(store: TestStore, tmp_path: Path) -> None:
    place = store.place()
    here, there = save_step(tmp_path, 3), save_step(place, 3)
    assert isinstance(there, ObjectPath)
    assert str(there) == f"{place}/step-00000003"
    client, files = objects_of(there), folder_of(there)
    assert client.sizes(files).keys() == {file.name for file in here.iterdir()}
    for file in here.glob("rank-*"):
        assert client.read(files / file.name) == file.read_bytes()
    assert _manifest(client.read(files / "manifest.json")) == _manifest((here / "manifest.json").read_bytes())
    load_and_compare(there, 3, 4)
    assert checkpoint.latest(str(place)) == place_of(str(there))
    assert checkpoint.describe(str(there)) == checkpoint.describe(here) | {
        "time_s": checkpoint.describe(there)["time_s"]
    }
    assert checkpoint.verify(str(there)).ok


def test_old_checkpoints_go_and_nothing_of_them_stays(store: TestStore) -> None:
    place = store.place()
    for step in (1, 2, 3, 3, 4):
        save_step(place, step, keep=2)
    assert [found.step for found in checkpoint.checkpoints(place)] == [3, 4]
    assert {name.split("/")[0] for name in objects_of(place).sizes(place)} == {
        "latest",
        "step-00000003",
        "step-00000004",
    }
    freed = sum(objects_of(place).sizes(place / "step-00000003").values())
    assert checkpoint.prune(place, Retention(1)).bytes_freed == freed
    assert len(checkpoint.checkpoints(place)) == 2
    assert checkpoint.prune(str(place), Retention(1), dry_run=False).removed == (3,)
    assert {name.split("/")[0] for name in objects_of(place).sizes(place)} == {"latest", "step-00000004"}
    load_and_compare(place / "step-00000004", 4, 2)


def test_damage_is_found_and_an_older_checkpoint_is_offered(store: TestStore) -> None:
    place = store.place()
    client = objects_of(place)
    older, newer = save_step(place, 1), save_step(place, 2)
    file = folder_of(newer) / "rank-00000.safetensors"
    assert isinstance(file, ObjectPath)
    whole = client.read(file)
    client.put(file, whole[:-1] + bytes([whole[-1] ^ 1]))
    assert [problem.kind for problem in checkpoint.verify(newer).problems] == ["checksum"]
    with pytest.raises(CheckpointCorrupt, match="the checksum is wrong"):
        load_and_compare(newer, 2, 1)
    client.put(file, whole[:-5])
    assert [problem.kind for problem in checkpoint.verify(newer).problems] == ["size"]
    assert checkpoint.latest(place) == older
    client.delete([file])
    assert [problem.kind for problem in checkpoint.verify(newer).problems] == ["missing file"]
    client.discard(newer)
    assert checkpoint.latest(place) == older  # although `latest` names the newer one
    with pytest.raises(CheckpointNotFound, match=f"the newest complete one beside it is {older}"):
        checkpoint.open_checkpoint(newer)


def test_no_weather_changes_a_byte(store: TestStore) -> None:
    _save_and_load_in_bad_weather(store, seed=1)


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(40))
def test_no_weather_of_many_changes_a_byte(store: TestStore, seed: int) -> None:
    _save_and_load_in_bad_weather(store, seed)


def _save_and_load_in_bad_weather(store: TestStore, seed: int) -> None:
    place = store.place(patience_s=60.0)
    store.proxy.weather = Weather(BAD_WEATHER, seed)
    for step in (1, 2, 2):
        save_step(place, step, keep=1)
    load_and_compare(place / "step-00000002", 2, 3)
    assert checkpoint.verify(place / "step-00000002").ok
    assert len(store.proxy.faults) >= 4, "the weather was fine"
    store.clear_up()
    left = {name.split("/")[0] for name in objects_of(place).sizes(place)}
    assert left == {"latest", "step-00000002"}


def test_a_store_that_cannot_be_reached_is_told_in_bounded_time_and_what_is_there_is_named(store: TestStore) -> None:
    place = store.place(patience_s=1.0)
    save_step(place, 1)
    store.proxy.weather = Weather(choose=lambda method, target: "503" if method == "PUT" else None)
    began_s = time.monotonic()
    with pytest.raises(CheckpointNotSaved, match=r"writing .* tried \d+ times in") as refused:
        save_step(place, 2)
    assert refused.value.newest == "step-00000001"
    assert "the newest is step-00000001" in str(refused.value)
    store.proxy.weather = Weather(choose=lambda *_: "503")
    with pytest.raises(CheckpointNotSaved):
        save_step(place, 2)
    with pytest.raises(StoreUnusable, match=f"{place}/latest failed, tried .* times in .* Check that the s3 endpoint"):
        checkpoint.latest(place)
    assert time.monotonic() - began_s < 20
    store.clear_up()
    load_and_compare(place / "step-00000001", 1, 2)
    assert [found.step for found in checkpoint.checkpoints(place)] == [1]


def test_a_store_that_refuses_is_asked_once_and_no_secret_is_told(store: TestStore) -> None:
    place = store.place()
    save_step(place, 1)
    store.proxy.forget()
    store.proxy.weather = Weather(choose=lambda method, target: "403" if method == "PUT" else None)
    with pytest.raises(CheckpointNotSaved, match=r"StoreRefused.* may list, read, write and delete") as refused:
        save_step(place, 2)
    assert store.proxy.count("PUT") == 1
    assert "of-tests" not in str(refused.value)
    store.proxy.weather = Weather(choose=lambda *_: "403")
    with pytest.raises(StoreRefused, match="tried once"):
        checkpoint.open_checkpoint(place / "step-00000001")


def test_a_bucket_that_is_not_there_is_named() -> None:
    place = ObjectPath("s3://no-such-bucket/run", patience_s=5.0)
    with pytest.raises(CheckpointNotSaved, match="there is no bucket no-such-bucket"):
        save_step(place, 1)


def test_a_load_fetches_the_chunks_that_it_needs_and_neighbours_by_one_request(store: TestStore) -> None:
    rows, columns = 12 * 1024, 1024  # of 4 KiB each: 48 MiB
    place, whole = store.place(), torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)
    shard = Shard(Box((0, 0), (rows, columns)), (0,))
    path = checkpoint.save(
        place, 1, ShardMap({"w": TensorShards("float32", (rows, columns), (shard,))}), {"w": whole}, {}
    )
    store.proxy.forget()
    wanted = Box((1000, 0), (10_000, columns))
    found = torch.empty(10_000, columns)
    result = checkpoint.load(path, {"w": (wanted, found)})
    assert torch.equal(found, whole[1000:11_000])
    chunks = result.bytes_read // CHUNK_BYTES
    needed = found.numel() * 4
    assert result.bytes_read <= needed + 2 * CHUNK_BYTES
    assert result.bytes_read <= 1.05 * needed
    assert store.proxy.sent["GET down"] <= 1.05 * result.bytes_read  # the manifest, too
    data = store.proxy.count("GET", r"\.safetensors")
    assert data <= -(-chunks // 8) + 1


def test_whatever_fsspec_knows_is_a_store(tmp_path: Path) -> None:
    for url in ("memory://checkpoints/run", f"file://{tmp_path}/run"):
        for step in (1, 2, 2):
            save_step(place_of(url), step, keep=1)
        path = checkpoint.latest(url)
        assert path is not None
        load_and_compare(path, 2, 3)
        assert checkpoint.verify(path).ok
    assert (tmp_path / "run" / "latest").is_file()


def test_what_a_store_cannot_hold_is_refused_with_the_reason(store: TestStore) -> None:
    place = store.place()
    objects_of(place).put(place / "notes.txt", b"x")
    with pytest.raises(CheckpointNotFound, match="is no checkpoint of DeepSpeed"):
        checkpoint.open_checkpoint(place)
    with pytest.raises(StoreUnusable, match="Write s3://BUCKET/PREFIX"):
        checkpoint.latest("s4://bucket/run")


def test_a_path_that_was_a_url_is_refused_before_a_folder_of_that_name_is_made() -> None:
    with pytest.raises(ValueError, match="has lost a slash"):
        checkpoint.latest(Path("s3://bucket/run"))
    assert place_of("file:///a/b") == Path("/a/b")
    assert place_of("relative/folder") == Path("relative/folder")


def test_parity_and_repair_are_refused_with_the_reason(store: TestStore) -> None:
    place = store.place()
    with pytest.raises(ParityUnusable, match="keeps every object in several places itself"):
        save_step(place, 1, parity=2)
    assert objects_of(place).sizes(place) == {}
    with pytest.raises(ParityUnusable, match="the store keeps every object in several places itself"):
        checkpoint.repair(save_step(place, 1))


def test_a_checkpoint_with_parity_that_was_copied_there_is_read_and_is_complete_with_all_its_files(
    store: TestStore, tmp_path: Path
) -> None:
    here, there = save_step(tmp_path, 3, parity=2), store.place() / "step-00000003"
    for file in here.iterdir():
        objects_of(there).put(there / file.name, file.read_bytes())
    load_and_compare(there, 3, 2)
    assert checkpoint.verify(there).ok
    assert checkpoint.latest(there.parent) == there
    objects_of(there).delete([there / "parity-00000-00.xor"])
    problems = checkpoint.verify(there).problems
    assert [(problem.kind, problem.repairable) for problem in problems] == [("missing file", False)]
    assert checkpoint.latest(there.parent) is None


def test_an_index_that_is_damaged_or_gone_is_told(store: TestStore) -> None:
    place = store.place()
    path = save_step(place, 1)
    file = folder_of(path) / "rank-00000.index"
    assert isinstance(file, ObjectPath)
    whole = objects_of(place).read(file)
    objects_of(place).put(file, whole[:-2] + b" }")
    assert [problem.kind for problem in checkpoint.verify(path).problems] == ["index"]
    with pytest.raises(CheckpointCorrupt, match=f"{file}: the index is not what was saved"):
        load_and_compare(path, 1, 1)
    objects_of(place).delete([file])
    assert [problem.kind for problem in checkpoint.verify(path).problems] == ["missing file"]
    assert checkpoint.latest(place) is None
