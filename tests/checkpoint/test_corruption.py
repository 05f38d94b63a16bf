"""Bytes that changed after they were saved are found, by verify and by load, and named."""

import random
import shutil
from pathlib import Path

import pytest
import torch

from evermesh.checkpoint import CheckpointCorrupt, Shard, ShardMap, TensorShards, latest, load, save, verify
from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.shard_map import Interval
from tests.checkpoint.states import load_and_compare, save_step

DATA = "rank-00000.safetensors"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_step(tmp_path, 1)


def _flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def test_every_flipped_bit_of_tensor_bytes_is_found_by_verify_and_by_load(saved: Path) -> None:
    choice = random.Random(0)
    size = (saved / DATA).stat().st_size
    begin = min(e.offset for t in read_manifest(saved).tensors.values() for e in t.extents)
    for _ in range(150):
        position, bit = choice.randrange(begin, size), choice.randrange(8)
        _flip(saved / DATA, position, bit)
        report = verify(saved)
        assert [problem.kind for problem in report.problems] == ["checksum"], (position, bit)
        with pytest.raises(CheckpointCorrupt, match="the checksum is wrong") as caught:
            load_and_compare(saved, 1, 1)
        assert caught.value.start <= position < caught.value.stop
        assert caught.value.chunk == position >> 20
        _flip(saved / DATA, position, bit)
    assert verify(saved).ok
    load_and_compare(saved, 1, 1)


def test_every_flipped_bit_of_the_manifest_is_found(saved: Path) -> None:
    choice = random.Random(1)
    size = (saved / "manifest.json").stat().st_size
    for _ in range(200):
        position, bit = choice.randrange(size), choice.randrange(8)
        _flip(saved / "manifest.json", position, bit)
        assert [problem.kind for problem in verify(saved).problems] == ["manifest"], (position, bit)
        assert latest(saved.parent) is None
        _flip(saved / "manifest.json", position, bit)
    assert latest(saved.parent) == saved


def test_the_error_names_file_chunk_bytes_and_tensors_of_the_damage_and_spares_the_rest(tmp_path: Path) -> None:
    size = 1 << 20
    names = ("a", "b", "c")
    whole = ShardMap({n: TensorShards("int32", (size,), (Shard(Interval(0, size), (0,)),)) for n in names})
    values = torch.arange(size, dtype=torch.int32)
    path = save(tmp_path, 1, whole, dict.fromkeys(names, values), {})
    extent = read_manifest(path).tensors["b"].extents[0]
    _flip(tmp_path / path.name / DATA, extent.offset + (2 << 20), 3)
    got = torch.zeros_like(values)
    with pytest.raises(
        CheckpointCorrupt, match=r"rank-00000\.safetensors: chunk 6, bytes 6,291,456 to 7,340,032.*hold b\."
    ):
        load(path, {"b": (Interval(0, size), got)}, strict=False)
    load(path, {"c": (Interval(0, size), got)}, strict=False)
    assert torch.equal(got, values)
    start = (3 << 20) // 4
    load(path, {"b": (Interval(start, size), got[start:])}, strict=False)  # the damaged chunk is not touched
    (problem,) = verify(path).problems
    assert (problem.kind, problem.file) == ("checksum", DATA)
    assert "(b)" in problem.text


def test_truncated_missing_and_extra_files_are_reported(saved: Path) -> None:
    copy = saved.parent / "copy"
    shutil.copytree(saved, copy)
    with (saved / DATA).open("r+b") as file:
        file.truncate(1000)
    (saved / "notes.txt").write_text("mine")
    assert [(p.kind, p.file) for p in verify(saved).problems] == [("extra file", "notes.txt"), ("size", DATA)]
    with pytest.raises(CheckpointCorrupt, match="it has 1,000 bytes"):
        load_and_compare(saved, 1, 1)
    (copy / DATA).unlink()
    assert [(p.kind, p.file) for p in verify(copy).problems] == [("missing file", DATA)]
    with pytest.raises(CheckpointCorrupt, match="the file is missing"):
        load_and_compare(copy, 1, 1)


def test_an_intact_checkpoint_is_read_whole_by_verify(saved: Path) -> None:
    report = verify(saved)
    assert report.ok
    assert report.bytes_read == (saved / DATA).stat().st_size


def test_extents_that_leave_a_gap_are_reported_and_not_loaded(saved: Path) -> None:
    manifest = read_manifest(saved)
    stored = manifest.tensors["optimizer.moment"]
    object.__setattr__(stored, "extents", ())
    (saved / "manifest.json").write_bytes(manifest.to_json())
    assert [problem.kind for problem in verify(saved).problems] == ["coverage"]
    with pytest.raises(CheckpointCorrupt, match=r"optimizer\.moment.*gap"):
        load_and_compare(saved, 1, 1)
