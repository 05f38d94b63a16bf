"""What was saved on some ranks is loaded bit for bit on others, and only what is needed is read."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from evermesh.checkpoint import (
    Box,
    CheckpointMismatch,
    CheckpointNotFound,
    CheckpointNotSaved,
    Interval,
    Padding,
    Shard,
    ShardMap,
    TensorShards,
    checkpoints,
    describe,
    directory,
    latest,
    load,
    save,
    verify,
    wanted_regions,
)
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.format import Manifest
from evermesh.checkpoint.retention import Retention
from evermesh.parallelism.collectives import Communicator
from tests.checkpoint.states import SHAPES, held_by, load_and_compare, logical_state, save_step, shard_map
from tests.cluster import run_ranks


def _save_on_rank(rank: int, world_size: int, directory: str, steps: tuple[int, ...]) -> str:
    communicator = Communicator(dist.group.WORLD)
    return [str(save_step(Path(directory), step, communicator)) for step in steps][-1]


def _one(dtype: str, shape: tuple[int, ...]) -> TensorShards:
    return TensorShards(dtype, shape, (Shard(Box((0,) * len(shape), shape), (0,)),))


@pytest.fixture(scope="module")
def saved_on_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    return Path(run_ranks(4, _save_on_rank, str(directory), (3, 10))[0])


@pytest.mark.parametrize("world_size", [1, 3, 4, 5])
def test_state_saved_on_4_ranks_loads_bit_equal_on(world_size: int, saved_on_4: Path) -> None:
    results = load_and_compare(saved_on_4, 10, world_size)
    assert all(result.step == 10 and result.world_size == 4 for result in results)
    assert results[0].objects == {"cursor": {"samples": 80}, "best": float("inf"), "rng": [2**70, 1]}
    assert results[0].description == {"model": "test"}


def test_any_box_and_interval_of_a_tensor_loads_into_any_tensor(saved_on_4: Path) -> None:
    state = logical_state(10)
    column = torch.zeros(300, 7, dtype=torch.float32)
    transposed = torch.zeros(20, 32).t()  # not contiguous: filled through a copy
    parts = [torch.zeros(50, 96, dtype=torch.bfloat16), torch.zeros(51 * 96, dtype=torch.bfloat16)]
    load(
        saved_on_4,
        {
            "optimizer.moment": (Box((0, 11), (300, 7)), column),
            "model.qkv": (Box((0, 5), (32, 20)), transposed),
            "model.embed": [(Box((0, 0), (50, 96)), parts[0]), (Interval(50 * 96, 101 * 96), parts[1])],
        },
        strict=False,
    )
    assert torch.equal(column, state["optimizer.moment"][:, 11:18])
    assert torch.equal(transposed, state["model.qkv"][:, 5:25])
    assert torch.equal(torch.cat([parts[0].reshape(-1), parts[1]]), state["model.embed"].reshape(-1))


def test_a_partial_load_reads_little_more_than_it_needs(tmp_path: Path) -> None:
    num_elements = 16 << 20
    values = torch.arange(num_elements, dtype=torch.int32)
    whole = ShardMap({"w": TensorShards("int32", (num_elements,), (Shard(Interval(0, num_elements), (0,)),))})
    path = save(tmp_path, 1, whole, {"w": values}, {})
    third = torch.zeros(num_elements // 3, dtype=torch.int32)
    result = load(path, {"w": (Interval(1000, 1000 + len(third)), third)})
    assert torch.equal(third, values[1000 : 1000 + len(third)])
    needed = third.numel() * 4
    assert needed <= result.bytes_read <= needed + (2 << 20)


def test_every_chunk_is_read_once_when_all_ranks_load(saved_on_4: Path) -> None:
    size = sum(path.stat().st_size for path in saved_on_4.glob("*.safetensors"))
    results = load_and_compare(saved_on_4, 10, 1)
    assert results[0].bytes_read <= size


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_survives_and_other_readers_open_it(dtype: str, tmp_path: Path) -> None:
    of_torch = getattr(torch, dtype)
    size = DTYPES[dtype].num_bytes
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (6 * 5 * size,), dtype=torch.uint8)
    values = raw.view(of_torch).view(6, 5)
    path = save(tmp_path, 1, ShardMap({"w": _one(dtype, (6, 5))}), {"w": values}, {})
    got = torch.zeros(6, 5, dtype=of_torch)
    load(path, {"w": (Box((0, 0), (6, 5)), got)})
    assert torch.equal(got.view(torch.uint8), values.view(torch.uint8))
    with safe_open(path / "rank-00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("w").view(torch.uint8), values.view(torch.uint8))


def test_safetensors_opens_the_files_of_all_ranks(saved_on_4: Path) -> None:
    state = logical_state(10)
    found: dict[str, torch.Tensor] = {}
    for path in sorted(saved_on_4.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
    assert torch.equal(found["model.norm"], state["model.norm"])
    assert torch.equal(found["model.embed[0:101, 24:48]"], state["model.embed"][:, 24:48])
    assert torch.equal(found["optimizer.moment[flat 75000:150000]"], state["optimizer.moment"].view(-1)[75000:150000])


def test_replicas_are_written_once(saved_on_4: Path) -> None:
    data = sum(path.stat().st_size for path in saved_on_4.glob("*.safetensors"))
    assert data <= shard_map(4).num_bytes + 4 * 2048  # headers


def test_tensors_that_are_not_contiguous_are_saved_row_major(tmp_path: Path) -> None:
    values = torch.randn(40, 30).t()
    path = save(tmp_path, 1, ShardMap({"w": _one("float32", (30, 40))}), {"w": values}, {})
    got = torch.zeros(30, 40)
    load(path, {"w": (Box((0, 0), (30, 40)), got)})
    assert torch.equal(got, values)


def test_empty_tensors_and_an_empty_state_are_saved(tmp_path: Path) -> None:
    path = save(tmp_path, 1, ShardMap({"w": _one("float32", (0, 4))}), {"w": torch.zeros(0, 4)}, {"a": 1})
    assert load(path, {"w": (Box((0, 0), (0, 4)), torch.zeros(0, 4))}).objects == {"a": 1}
    assert load(save(tmp_path, 2, ShardMap({}), {}, {}), {}).bytes_read == 0
    assert verify(path).ok


def test_padding_of_the_destination_is_left_as_it_is(tmp_path: Path) -> None:
    path = save(tmp_path, 1, ShardMap({"w": _one("float32", (5,))}), {"w": torch.arange(5.0)}, {})
    padded = ShardMap({"w": TensorShards("float32", (5,), (Shard(Interval(0, 8), (0,)),), padding=Padding(None, 3))})
    got = torch.full((8,), 7.0)
    load(path, wanted_regions(padded, 0, {"w": got}), shard_map=padded)
    assert got.tolist() == [0, 1, 2, 3, 4, 7, 7, 7]


def test_all_missing_extra_and_differing_tensors_are_named(saved_on_4: Path) -> None:
    whole = shard_map(1)
    changed = dict(whole.tensors)
    del changed["model.norm"], changed["model.mask"]
    changed["model.scale"] = _one("float32", ())
    changed["model.embed"] = _one("bfloat16", (96, 101))
    changed["model.head"] = _one("float32", (9, 9))
    with pytest.raises(CheckpointMismatch) as caught:
        load(saved_on_4, {}, shard_map=ShardMap(changed))
    assert caught.value.differences == (
        "missing in the checkpoint: model.head [9, 9]",
        "extra in the checkpoint: model.mask bool [7, 3]",
        "extra in the checkpoint: model.norm float32 [96]",
        "model.embed is bfloat16 [101, 96] there, bfloat16 [96, 101] is wanted",
        "model.scale is float64 [] there, float32 [] is wanted",
    )


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            {"model.norm": (Interval(0, 96), torch.zeros(96, dtype=torch.float16))},
            r"float32 \[96\] there, float16 is wanted",
        ),
        ({"model.norm": (Interval(0, 97), torch.zeros(97))}, "reaches beyond its 96 elements"),
        ({"model.norm": (Interval(0, 96), torch.zeros(95))}, "has 96 elements, its tensor 95"),
        ({"model.qkv": (Box((0,), (32,)), torch.zeros(32))}, "does not lie in its stored shape"),
        ({"nothing": (Interval(0, 1), torch.zeros(1))}, "missing in the checkpoint: nothing"),
    ],
)
def test_a_region_that_does_not_fit_is_named_and_nothing_is_read(
    wanted: dict[str, Any], message: str, saved_on_4: Path
) -> None:
    with pytest.raises(CheckpointMismatch, match=message):
        load(saved_on_4, wanted, strict=False)
    assert all(not entry[1].any() for entry in wanted.values())


def test_a_wrong_shape_dtype_or_set_of_tensors_is_not_saved(tmp_path: Path) -> None:
    whole = ShardMap({"w": _one("float32", (4, 4)), "b": _one("float32", (4,))})
    with pytest.raises(
        CheckpointNotSaved, match=r"b has 0 tensors for 1 regions; c is not in .* w.* its tensor is float64 of 15"
    ):
        save(tmp_path, 1, whole, {"w": torch.zeros(15, dtype=torch.float64), "c": torch.zeros(1)}, {})
    with pytest.raises(CheckpointNotSaved, match="set"):
        save(tmp_path, 1, ShardMap({}), {}, {"queue": {1, 2}})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def _save_with_a_bad_tensor_on_rank_2(rank: int, world_size: int, directory: str) -> tuple[int, str]:
    held = held_by(rank, world_size, logical_state(1))
    if rank == 2:
        held["model.embed"] = []
    try:
        save(directory, 1, shard_map(world_size), held, {}, communicator=Communicator(dist.group.WORLD))
    except CheckpointNotSaved as error:
        return error.rank, error.cause
    raise AssertionError("it was saved")


def test_an_error_of_one_rank_is_raised_by_all(tmp_path: Path) -> None:
    answers = run_ranks(3, _save_with_a_bad_tensor_on_rank_2, str(tmp_path))
    assert len(set(answers)) == 1
    assert answers[0][0] == 2
    assert "ShardMapInvalid" in answers[0][1]


def _save_other_maps(rank: int, world_size: int, directory: str) -> str:
    both = (Shard(Interval(0, 40_000), (0,)), Shard(Interval(40_000, 80_000), (1,)))
    name = "w" if rank == 0 else "v"
    try:
        save(
            directory,
            1,
            ShardMap({name: TensorShards("float32", (80_000,), both)}),
            {name: torch.zeros(40_000)},
            {},
            communicator=Communicator(dist.group.WORLD),
        )
    except CheckpointNotSaved as error:
        return error.cause
    raise AssertionError("it was saved")


def test_ranks_that_disagree_about_the_map_save_nothing(tmp_path: Path) -> None:
    assert all("ranks [1] saved another shard map" in cause for cause in run_ranks(2, _save_other_maps, str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


def test_retention_keeps_the_newest_and_never_removes_the_latest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step)
    assert [found.step for found in checkpoints(tmp_path)] == [3, 4]
    save_step(tmp_path, 2)  # a run that was taken back
    assert [found.step for found in checkpoints(tmp_path)] == [2, 4]
    newest = latest(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000002"
    load_and_compare(newest, 2, 2)
    save_step(tmp_path, 5, keep=1)
    assert [found.step for found in checkpoints(tmp_path)] == [5]
    save_step(tmp_path, 6, keep=None)
    assert [(found.step, found.is_latest) for found in checkpoints(tmp_path)] == [(5, False), (6, True)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000005", "step-00000006"]


def test_retention_counts_steps_above_the_saved_one_as_the_oldest() -> None:
    def kept(steps: list[int], last: int) -> set[int]:
        return Retention(last).kept(dict.fromkeys(steps, 0.0), 20, now_s=1.0)

    assert kept([10, 20, 30], 2) == {10, 20}
    assert kept([20, 30, 40], 2) == {20, 40}
    assert kept([20, 30], 0) == {20}


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    whole = ShardMap({"w": _one("float32", (3,))})
    for value in (1.0, 2.0):
        save(tmp_path, 7, whole, {"w": torch.full((3,), value)}, {})
    got = torch.zeros(3)
    load(tmp_path / "step-00000007", {"w": (Interval(0, 3), got)})
    assert got.tolist() == [2.0] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000007"]


@pytest.mark.parametrize("content", [None, b"", b"step-00000099\n", b"../step-00000001\n", b"\xff\xfe"])
def test_latest_falls_back_to_the_newest_complete_checkpoint(content: bytes | None, tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    save_step(tmp_path, 2)
    if content is None:
        (tmp_path / "latest").unlink()
    else:
        (tmp_path / "latest").write_bytes(content)
    assert latest(tmp_path) == tmp_path / "step-00000002"
    (tmp_path / "step-00000002" / "rank-00000.safetensors").write_bytes(b"short")
    assert latest(tmp_path) == tmp_path / "step-00000001"


def test_latest_of_a_directory_without_checkpoints_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None
    assert checkpoints(tmp_path / "nowhere") == []
    with pytest.raises(CheckpointNotFound, match=r"has no manifest\.json"):
        load(tmp_path, {})


def test_a_checkpoint_that_is_removed_while_all_are_listed_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save_step(tmp_path, step)
    is_complete = directory._is_complete

    def then_removed(path: Path) -> bool:
        found = is_complete(path)
        if path.name == "step-00000001":
            shutil.rmtree(path)
        return found

    monkeypatch.setattr(directory, "_is_complete", then_removed)
    assert [found.step for found in checkpoints(tmp_path)] == [2]


def test_a_checkpoint_describes_itself_in_json(saved_on_4: Path) -> None:
    told = describe(saved_on_4)
    assert json.loads(json.dumps(told)) == told
    assert (told["step"], told["world_size"], told["objects"]) == (10, 4, ["cursor", "best", "rng"])
    tensors = told["tensors"]
    assert isinstance(tensors, list)
    assert {(t["name"], t["dtype"], tuple(t["shape"])) for t in tensors} == {  # type: ignore[index, call-overload, arg-type]
        (name, dtype, shape) for name, (dtype, shape) in SHAPES.items()
    }


def test_the_manifest_survives_json_and_knows_neither_extents_nor_chunks(saved_on_4: Path) -> None:
    payload = (saved_on_4 / "manifest.json").read_bytes()
    manifest = Manifest.from_json(payload)
    assert Manifest.from_json(manifest.to_json()) == manifest
    values = json.loads(payload)
    assert values["step"] == 10
    assert [sorted(of_rank) for of_rank in values["ranks"]] == [["files", "num_bytes", "xxh3_64"]] * 4
    assert not any(word in payload for word in (b"checksums", b'"offset"', b"extents"))


def test_a_load_opens_the_indexes_of_the_ranks_that_wrote_what_it_wants(saved_on_4: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(saved_on_4, tmp_path / "copy"))
    for rank in (0, 2, 3):
        for file in path.glob(f"rank-0000{rank}*"):
            file.unlink()
    state = logical_state(10)
    got = torch.zeros(101, 24, dtype=torch.bfloat16)
    load(path, {"model.embed": (Box((0, 24), (101, 24)), got)}, strict=False)
    assert torch.equal(got, state["model.embed"][:, 24:48])
