"""A save that is killed at any system call leaves the previous checkpoint or the new one, and the next save works."""

from pathlib import Path

import pytest
import torch.distributed as dist

from evermesh.checkpoint import CheckpointCorrupt, checkpoints, latest
from evermesh.parallelism.collectives import Communicator
from tests.checkpoint.killing import (
    NEW_STATE,
    OLD_STATE,
    Calls,
    Kill,
    die_at_every_call,
    next_save_works,
    state_of_latest,
)
from tests.checkpoint.states import load_and_compare, save_step
from tests.cluster import RankFailed, run_ranks


@pytest.mark.parametrize(
    ("step", "parity"), [(2, None), (1, None), (2, 1)], ids=["a new step", "the same step anew", "with parity"]
)
def test_a_save_killed_at_any_system_call_leaves_the_old_or_the_new_checkpoint(
    step: int, parity: int | None, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    save_step(base, 1, state=OLD_STATE)
    found = []
    for _, directory in die_at_every_call(base, step, NEW_STATE, parity):
        found.append(state_of_latest(directory))
        next_save_works(directory)
    assert len(found) > 27
    # the old one up to some call, the new one from there on; retention comes after
    assert found == sorted(found)
    assert set(found) == {OLD_STATE, NEW_STATE}


def _save_with_a_rank_that_dies(rank: int, world_size: int, directory: str, who: int, kill: Kill) -> None:
    if rank == who:
        Calls(kill).install()
    save_step(Path(directory), 2, Communicator(dist.group.WORLD))


@pytest.mark.parametrize(
    ("who", "kill"),
    [
        (1, Kill(2, half=True)),
        (2, Kill(7, half=True)),
        (0, Kill(15, half=True)),
        (0, Kill(22)),
    ],
    ids=["in its file", "in its index", "rank 0 in the manifest", "rank 0 before the rename"],
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
    next_save_works(tmp_path)


def test_a_directory_that_is_no_checkpoint_is_no_latest(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    (tmp_path / "step-00000009").mkdir()
    (tmp_path / "latest").write_text("step-00000009\n")
    assert latest(tmp_path) == path
    (path / "manifest.json").write_text("{}")
    assert latest(tmp_path) is None
    with pytest.raises(CheckpointCorrupt, match="not what was saved"):
        load_and_compare(path, 1, 1)
