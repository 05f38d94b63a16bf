"""Bytes that changed after they were saved are found, by verify and by load, and named."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from evermesh.checkpoint import (
    CheckpointCorrupt,
    Shard,
    ShardMap,
    TensorShards,
    latest,
    load,
    open_checkpoint,
    save,
    verify,
    wanted_regions,
)
from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.encoding import index_head, index_payload, sealed
from evermesh.checkpoint.format import RankFiles
from evermesh.checkpoint.shard_map import Interval
from evermesh.parallelism.collectives import Communicator
from tests.checkpoint.states import load_and_compare, save_step
from tests.cluster import run_ranks

DATA, INDEX = "rank-00000.safetensors", "rank-00000.index"


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
    begin = min(e.offset for t in open_checkpoint(saved).tensors.values() for e in t.extents)
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
    around_the_checksum = [(position, bit) for position in range(48) for bit in range(8)]
    for position, bit in [*around_the_checksum, *((choice.randrange(size), choice.randrange(8)) for _ in range(200))]:
        _flip(saved / "manifest.json", position, bit)
        assert [problem.kind for problem in verify(saved).problems] == ["manifest"], (position, bit)
        assert latest(saved.parent) is None
        _flip(saved / "manifest.json", position, bit)
    assert latest(saved.parent) == saved


def test_every_flipped_bit_of_an_index_is_found_by_verify_and_by_load(saved: Path) -> None:
    choice = random.Random(2)
    size = (saved / INDEX).stat().st_size
    for _ in range(60):
        position, bit = choice.randrange(size), choice.randrange(8)
        _flip(saved / INDEX, position, bit)
        assert [(p.kind, p.file) for p in verify(saved).problems] == [("index", INDEX)], (position, bit)
        with pytest.raises(CheckpointCorrupt, match="the index is not what was saved"):
            load_and_compare(saved, 1, 1)
        _flip(saved / INDEX, position, bit)
    load_and_compare(saved, 1, 1)


def test_files_of_two_ranks_that_were_swapped_are_found(tmp_path: Path) -> None:
    halves = (Shard(Interval(0, 50_000), (0,)), Shard(Interval(50_000, 100_000), (1,)))
    whole = ShardMap({"w": TensorShards("int32", (100_000,), halves)})
    path = Path(run_ranks(2, _save_halves, str(tmp_path))[0])
    for kind, message in (("safetensors", "the checksum is wrong"), ("index", "the index is not what was saved")):
        names = [path / f"rank-0000{rank}.{kind}" for rank in (0, 1)]
        _swap(*names)
        assert {problem.file for problem in verify(path).problems} == {name.name for name in names}
        for rank in (0, 1):
            got = torch.zeros(50_000, dtype=torch.int32)
            with pytest.raises(CheckpointCorrupt, match=message):
                load(path, wanted_regions(whole, rank, {"w": got}), shard_map=whole)
        _swap(*names)
    assert verify(path).ok


def _save_halves(rank: int, size: int, directory: str) -> str:
    halves = (Shard(Interval(0, 50_000), (0,)), Shard(Interval(50_000, 100_000), (1,)))
    whole = ShardMap({"w": TensorShards("int32", (100_000,), halves)})
    values = torch.arange(50_000, dtype=torch.int32) + rank
    return str(save(directory, 1, whole, {"w": values}, {}, communicator=Communicator(dist.group.WORLD)))


def _swap(one: Path, other: Path) -> None:
    one.rename(one.with_suffix(".aside"))
    other.rename(one)
    one.with_suffix(".aside").rename(other)


def test_the_error_names_file_chunk_bytes_and_tensors_of_the_damage_and_spares_the_rest(tmp_path: Path) -> None:
    size = 1 << 20
    names = ("a", "b", "c")
    whole = ShardMap({n: TensorShards("int32", (size,), (Shard(Interval(0, size), (0,)),)) for n in names})
    values = torch.arange(size, dtype=torch.int32)
    path = save(tmp_path, 1, whole, dict.fromkeys(names, values), {})
    extent = open_checkpoint(path).tensors["b"].extents[0]
    _flip(tmp_path / path.name / DATA, extent.offset + (2 << 20), 3)
    got = torch.zeros_like(values)
    with pytest.raises(
        CheckpointCorrupt,
        match=r"rank-00000\.safetensors: chunk 6, bytes 6,291,456 to 7,340,032.*"
        r"hold b\[flat 0:1048576\] elements 524,2\d\d to 786,\d\d\d\.",
    ):
        load(path, {"b": (Interval(0, size), got)}, strict=False)
    load(path, {"c": (Interval(0, size), got)}, strict=False)
    assert torch.equal(got, values)
    start = (3 << 20) // 4
    load(path, {"b": (Interval(start, size), got[start:])}, strict=False)  # the damaged chunk is not touched
    (problem,) = verify(path).problems
    assert (problem.kind, problem.file) == ("checksum", DATA)
    assert "(b[flat 0:1048576] elements 524,2" in problem.text


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


def _forge(saved: Path, change: Callable[[dict[str, Any]], object], name: str = DATA) -> None:
    """Change the index, and make everything that says what it must be fit it; the data file is called ``name``."""
    manifest = read_manifest(saved)
    body = json.loads((saved / INDEX).read_bytes().partition(b"\n")[2])
    change(body)
    files = {name: (manifest.ranks[0].files[DATA], body["checksums"][DATA])}
    payload = index_payload(files, body["extents"], {})
    (saved / INDEX).write_bytes(payload)
    head = index_head(payload.partition(b"\n")[0] + b"\n")
    forged = replace(manifest, ranks=(RankFiles(head.xxh3_64, head.num_bytes, head.files),))
    (saved / "manifest.json").write_bytes(forged.to_json())


def test_extents_that_leave_a_gap_are_reported_and_not_loaded(saved: Path) -> None:
    _forge(saved, lambda body: body["extents"].pop("optimizer.moment"))
    assert [(problem.kind, problem.file) for problem in verify(saved).problems] == [("coverage", INDEX)]
    with pytest.raises(CheckpointCorrupt, match=r"optimizer\.moment.*gap"):
        load_and_compare(saved, 1, 1)


def _first(body: dict[str, Any]) -> dict[str, Any]:
    extent: dict[str, Any] = next(iter(body["extents"].values()))[0]
    return extent


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (lambda body: _first(body).update(offset=1 << 40), "are not at byte 1099511627776"),
        (lambda body: _first(body).update(offset=-8), "are not at byte -8"),
        (lambda body: _first(body).update(stop=1 << 50), "elements 0 to"),
        (lambda body: _first(body).update(file="other"), "of a file"),
        (
            lambda body: body["extents"].update(stranger=[_first(body)]),
            "tensor stranger: the manifest does not know it",
        ),
        (lambda body: body["checksums"].update({DATA: "00"}), "not one checksum for every chunk"),
    ],
)
def test_an_index_that_tells_what_cannot_be_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], object], fact: str
) -> None:
    _forge(saved, change)
    with pytest.raises(CheckpointCorrupt, match=fact):
        load_and_compare(saved, 1, 1)


def test_a_manifest_that_names_a_file_elsewhere_is_refused(saved: Path) -> None:
    _forge(saved, lambda body: None, name="../secret")
    with pytest.raises(CheckpointCorrupt, match=r"it names the file '\.\./secret', which is not beside it"):
        open_checkpoint(saved)


def test_a_manifest_of_another_version_tells_which(saved: Path) -> None:
    values = json.loads((saved / "manifest.json").read_bytes())
    del values["xxh3_64"]
    (saved / "manifest.json").write_bytes(sealed(values | {"format_version": 1, "files": {}}))
    with pytest.raises(CheckpointCorrupt, match="format 1; this version reads 2"):
        open_checkpoint(saved)
