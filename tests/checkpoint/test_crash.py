"""A save that is killed at any system call leaves the previous checkpoint or the new one, and the next save works."""

import os
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
        (0, Kill(9, half=True, of="write")),
        (0, Kill(0, of="rename")),
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


def test_nothing_gets_its_name_before_all_of_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed processes lose nothing that was written, machines without power do: only the order of syncs helps."""
    save_step(tmp_path, 1, keep=1)
    paths: dict[int, Path] = {}
    lacking: set[Path] = set()
    events: list[str] = []
    system = {name: getattr(os, name) for name in ("open", "write", "fsync", "rename")}

    def opened(path: str, flags: int, *arguments: int, **keywords: int) -> int:
        descriptor: int = system["open"](path, flags, *arguments, **keywords)
        paths[descriptor] = Path(path)
        if flags & os.O_CREAT:
            lacking.update({Path(path), Path(path).parent})
        return descriptor

    def written(descriptor: int, payload: bytes) -> int:
        lacking.add(paths[descriptor])
        return int(system["write"](descriptor, payload))

    def synced(descriptor: int) -> None:
        system["fsync"](descriptor)
        lacking.discard(paths[descriptor])
        events.append(f"sync {paths[descriptor].name}")

    def renamed(source: Path, target: Path) -> None:
        below = {path for path in lacking if path.is_relative_to(source)}
        assert not below, f"{below} were not on the disk when {source.name} was renamed"
        if target.name.startswith(".removing-"):
            assert tmp_path not in lacking, "the new one may be lost yet"
        else:
            lacking.add(target.parent)
        system["rename"](source, target)
        events.append(f"rename {target.name}")

    for name, wrapped in (("open", opened), ("write", written), ("fsync", synced), ("rename", renamed)):
        monkeypatch.setattr(os, name, wrapped)
    save_step(tmp_path, 2, keep=1)
    monkeypatch.undo()
    committed = events.index("rename step-00000002")
    assert {event for event in events[:committed] if event.startswith("sync rank-00000")} == {
        "sync rank-00000.safetensors",
        "sync rank-00000.index",
    }
    assert {"sync manifest.json", "sync .saving-latest"} <= set(events[:committed])
    assert events[committed : committed + 3] == ["rename step-00000002", "rename latest", f"sync {tmp_path.name}"]
    assert events[committed + 3 :] == ["rename .removing-step-00000001"]
