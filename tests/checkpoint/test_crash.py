"""A save that is killed at any system call leaves the previous checkpoint or the new one, and the next save works."""

import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from evermesh.checkpoint import CheckpointCorrupt, checkpoints, latest, verify
from evermesh.parallelism.collectives import Communicator
from tests.checkpoint.killing import Calls, Kill, calls_of_a_save, save_and_die
from tests.checkpoint.states import load_and_compare, save_step
from tests.cluster import RankFailed, run_ranks

OLD_STATE, NEW_STATE = 1, 2


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step anew"])
def test_a_save_killed_at_any_system_call_leaves_the_old_or_the_new_checkpoint(step: int, tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_step(base, 1, state=OLD_STATE)
    shutil.copytree(base, tmp_path / "counted")
    names = calls_of_a_save(tmp_path / "counted", step, NEW_STATE)
    assert {"mkdir", "write", "fsync", "rename", "rmdir"} <= set(names)
    found = []
    for call, name in enumerate(names):
        directory = tmp_path / f"killed-{call}"
        shutil.copytree(base, directory)
        save_and_die(directory, step, NEW_STATE, Kill(call, half=name == "write"))
        found.append(_state_of_latest(directory))
        _next_save_works(directory)
        shutil.rmtree(directory)
    # the old one up to some call, the new one from there on; retention comes after
    assert found == sorted(found)
    assert set(found) == {OLD_STATE, NEW_STATE}


def _state_of_latest(directory: Path) -> int:
    """Which of the two states the latest checkpoint holds, all of it."""
    path = latest(directory)
    assert path is not None
    assert verify(path).ok
    try:
        load_and_compare(path, OLD_STATE, 1)
    except AssertionError:
        load_and_compare(path, NEW_STATE, 1)
        return NEW_STATE
    return OLD_STATE


def _next_save_works(directory: Path) -> None:
    path = save_step(directory, 3, keep=1)
    assert sorted(entry.name for entry in directory.iterdir()) == ["latest", path.name]
    assert latest(directory) == path
    load_and_compare(path, 3, 1)


def _save_with_a_rank_that_dies(rank: int, world_size: int, directory: str, who: int, kill: Kill) -> None:
    if rank == who:
        Calls(kill).install()
    save_step(Path(directory), 2, Communicator(dist.group.WORLD))


@pytest.mark.parametrize(
    ("who", "kill"),
    [
        (1, Kill(0)),
        (1, Kill(2, half=True)),
        (2, Kill(5)),
        (0, Kill(3, half=True)),
        (0, Kill(10)),
    ],
    ids=["before its file", "in its file", "in its record", "rank 0 in its file", "rank 0 in the manifest"],
)
def test_a_rank_killed_in_a_save_of_4_ranks_leaves_the_previous_checkpoint(
    who: int, kill: Kill, tmp_path: Path
) -> None:
    path = save_step(tmp_path, 1)
    with pytest.raises(RankFailed):
        run_ranks(4, _save_with_a_rank_that_dies, str(tmp_path), who, kill)
    assert latest(tmp_path) == path
    assert [found.step for found in checkpoints(tmp_path)] == [1]
    load_and_compare(path, 1, 3)
    _next_save_works(tmp_path)


def test_a_directory_that_is_no_checkpoint_is_no_latest(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "latest").write_text("step-00000009\n")
    assert latest(tmp_path) == path
    (path / "manifest.json").write_text("{}")
    assert latest(tmp_path) is None
    with pytest.raises(CheckpointCorrupt, match="not what was saved"):
        load_and_compare(path, 1, 1)
