"""The files of any one rank of a stripe are made again from the others: while loading, and for good by ``repair``."""

import itertools
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from evermesh.checkpoint import BackgroundSaver, CheckpointCorrupt, ParityUnusable, latest, repair, save, verify
from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.parity import Stripes
from evermesh.parallelism.collectives import Communicator
from tests.checkpoint.states import held_by, load_and_compare, logical_state, shard_map
from tests.cluster import run_ranks

RANKS = 5


def _save(rank: int, size: int, directory: str, width: int, step: int) -> str:
    held, tap = held_by(rank, size, logical_state(step)), Communicator(dist.group.WORLD)
    return str(save(Path(directory), step, shard_map(size), held, {}, communicator=tap, parity=width))


def _save_behind(rank: int, size: int, directory: str, width: int, step: int) -> str:
    held, tap = held_by(rank, size, logical_state(step)), Communicator(dist.group.WORLD)
    with BackgroundSaver(Path(directory), shard_map(size), held, communicator=tap, parity=width) as saver:
        saver.begin(step, {})
        report = saver.finish()
    assert report is not None
    return str(report.path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five ranks in stripes of {0, 2, 4} and {1, 3}."""
    return Path(run_ranks(RANKS, _save, str(tmp_path_factory.mktemp("saved")), 3, 1)[0])


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def _files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_parity_is_the_exclusive_or_of_the_files_of_a_stripe_and_costs_one_part_more(saved: Path) -> None:
    manifest = read_manifest(saved)
    for stripe, ranks in enumerate(((0, 2, 4), (1, 3))):
        payloads = [
            (saved / f"rank-0000{rank}.safetensors").read_bytes() + (saved / f"rank-0000{rank}.index").read_bytes()
            for rank in ranks
        ]
        expected = np.zeros(max(map(len, payloads)), np.uint8)
        for payload in payloads:
            expected[: len(payload)] ^= np.frombuffer(payload, np.uint8)
        parts = sorted(saved.glob(f"parity-0000{stripe}-*.xor"))
        assert b"".join(part.read_bytes() for part in parts) == expected.tobytes()
    assert manifest.num_bytes == sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    assert verify(saved).ok


def test_a_save_behind_training_writes_the_same_parity(saved: Path, tmp_path: Path) -> None:
    path = Path(run_ranks(RANKS, _save_behind, str(tmp_path), 3, 1)[0])
    ours, theirs = _files(path), _files(saved)
    del ours["manifest.json"], theirs["manifest.json"]
    assert ours == theirs


@pytest.mark.parametrize("rank", range(RANKS))
def test_the_files_of_a_lost_rank_are_read_from_parity_and_repaired_for_good(
    rank: int, path: Path, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in path.glob(f"rank-0000{rank}*"):
        file.unlink()
    assert latest(path.parent) == path, "it is resumed from all the same"
    with caplog.at_level(logging.WARNING):
        load_and_compare(path, 1, 3)
    assert f"rank-0000{rank}.safetensors is lost or damaged" in caplog.text
    assert "evermesh checkpoint repair" in caplog.text
    report = verify(path)
    assert [problem.kind for problem in report.problems] == ["missing file"] * 2
    assert report.repairable
    repaired = repair(path)
    assert (set(repaired.repaired), repaired.left) == (
        {f"rank-0000{rank}.index", f"rank-0000{rank}.safetensors"},
        (),
    )
    assert _files(path) == _files(saved)


def test_one_rank_of_every_stripe_may_be_lost_at_once_but_not_two_of_one(path: Path, saved: Path) -> None:
    for rank in (1, 2):
        (path / f"rank-0000{rank}.safetensors").unlink()
    load_and_compare(path, 1, 2)
    (path / "rank-00004.safetensors").unlink()
    assert latest(path.parent) is None
    with pytest.raises(CheckpointCorrupt, match="the file is missing"):
        load_and_compare(path, 1, 2)
    report = verify(path)
    assert {(problem.file, problem.repairable) for problem in report.problems} == {
        ("rank-00001.safetensors", True),
        ("rank-00002.safetensors", False),
        ("rank-00004.safetensors", False),
    }
    assert repair(path).repaired == ("rank-00001.safetensors",)
    shutil.copy(saved / "rank-00004.safetensors", path)
    assert repair(path).left == ()
    assert _files(path) == _files(saved)


def test_every_damage_of_one_file_is_made_good(path: Path, saved: Path) -> None:
    choice, files = random.Random(3), _files(saved)
    names = sorted(files.keys() - {"manifest.json"})
    for name in names * 3:
        damaged = bytearray(files[name])
        kind = choice.choice(["flip", "cut", "swap", "gone"])
        if kind == "flip":
            damaged[choice.randrange(len(damaged))] ^= 1 << choice.randrange(8)
        elif kind == "cut":
            del damaged[choice.randrange(len(damaged)) :]
        elif kind == "swap":
            damaged = bytearray(files[choice.choice([other for other in names if files[other] != files[name]])])
        (path / name).write_bytes(damaged)
        if kind == "gone":
            (path / name).unlink()
        load_and_compare(path, 1, 1)
        assert not verify(path).ok, (name, kind)
        assert verify(path).repairable, (name, kind)
        assert repair(path).left == (), (name, kind)
        assert _files(path) == files, (name, kind)


def test_what_cannot_be_made_again_is_left_as_it_is(path: Path) -> None:
    for rank in (0, 2):
        file = path / f"rank-0000{rank}.safetensors"
        content = bytearray(file.read_bytes())
        content[5000 + rank] ^= 1
        file.write_bytes(content)
    before = _files(path)
    report = repair(path)
    assert report.repaired == ()
    assert {problem.file for problem in report.left} == {"rank-00000.safetensors", "rank-00002.safetensors"}
    assert not any(problem.repairable for problem in report.left)
    assert _files(path) == before


def test_without_parity_nothing_is_repairable(tmp_path: Path) -> None:
    held = held_by(0, 1, logical_state(1))
    path = save(tmp_path, 1, shard_map(1), held, {})
    (tmp_path / path.name / "rank-00000.index").unlink()
    assert not verify(path).repairable
    assert repair(path).repaired == ()
    with pytest.raises(ParityUnusable, match="parity is 0, but a stripe has at least one rank"):
        save(tmp_path, 2, shard_map(1), held, {}, parity=0)


def test_a_stripe_of_one_rank_is_a_second_copy(tmp_path: Path) -> None:
    save(tmp_path, 1, shard_map(1), held_by(0, 1, logical_state(1)), {}, parity=4)
    path = tmp_path / "step-00000001"
    files = _files(path)
    for file in path.glob("rank-*"):
        file.unlink()
    load_and_compare(path, 1, 2)
    assert repair(path).left == ()
    assert _files(path) == files


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_every_part_of_the_parity_of_every_stripe_is_written_by_one_rank(
    size: int, width: int, data: st.DataObject
) -> None:
    stripes = Stripes(size, width)
    lengths = data.draw(st.lists(st.integers(1, 30 << 20), min_size=size, max_size=size))
    assert sorted(itertools.chain(*map(stripes.members, range(stripes.number)))) == list(range(size))
    assert all(1 <= len(stripes.members(stripe)) <= width for stripe in range(stripes.number))
    written = []
    for rank in range(size):
        stripe = stripes.protected_by(rank)
        assert rank not in stripes.members(stripe) or stripes.number == 1
        written += stripes.written_by(rank, stripes.parts(stripe, lengths.__getitem__))
    parts = [part for stripe in range(stripes.number) for part in stripes.parts(stripe, lengths.__getitem__)]
    assert sorted(written) == sorted(parts)
    for stripe in range(stripes.number):
        spans = [(part.start, part.stop) for part in parts if part.stripe == stripe]
        edges = [0, *(stop for _, stop in spans)]
        assert [start for start, _ in spans] == edges[:-1]
        assert edges[-1] == max(lengths[rank] for rank in stripes.members(stripe))
