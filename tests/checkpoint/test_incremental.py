"""Files that an older checkpoint holds are linked, and no sequence of saves, deletions and crashes harms a checkpoint."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from evermesh.checkpoint import Box, Retention, Shard, ShardMap, TensorShards, latest, load, verify
from evermesh.checkpoint.background import data_files
from evermesh.checkpoint.background.orders import SaveOrder
from evermesh.checkpoint.background.writer import Writer
from evermesh.checkpoint.committing import committed_steps, remove
from evermesh.checkpoint.pruning import prune
from tests.checkpoint.killing import CHANGES_DISK
from tests.checkpoint.writers import plan_and_arena

NAMES = ("a", "b", "c", "d", "e")
SIZE = 3000


class _Killed(BaseException):
    """Nothing after it touches the disk, as if the process were gone: no code catches it."""


class _Run:
    """A trainer of five tensors and its writer, in one process; ``values`` is what training has made of them."""

    def __init__(self, directory: Path, retention: Retention | None = None) -> None:
        self.directory, self.retention = directory, retention or Retention(last=None)
        self.values = dict.fromkeys(NAMES, 0)
        self.expected: dict[int, dict[str, int]] = {}
        """What the checkpoints hold."""
        self.restart()

    def restart(self) -> None:
        """Another process, which knows nothing of the one before."""
        self.plan, self.arena = plan_and_arena(
            _map(), _held(self.values), 0, 1, self.directory, self.retention, incremental=True
        )
        self.num_saves = 0
        self.writer = Writer(self.plan, memoryview(self.arena), self._take)

    def save(self, step: int) -> None:
        self.arena[:] = plan_and_arena(_map(), _held(self.values), 0, 1, self.directory)[1]
        self.num_saves += 1
        self.answers = b""
        self.writer.save(SaveOrder(f"{id(self)}-{self.num_saves}", step, {}, {}))
        assert b'"committed"' in self.answers, self.answers
        self.expected[step] = dict(self.values)

    def check(self) -> None:
        """Every checkpoint is whole and holds what it was saved with."""
        for step, values in self.expected.items():
            path = self.directory / f"step-{step:08d}"
            assert verify(path).ok
            assert _loaded(path) == values

    def num_files(self, step: int) -> tuple[int, int]:
        """Data files of a checkpoint, and those of them that another one has too."""
        files = list((self.directory / f"step-{step:08d}").glob("*.safetensors"))
        return len(files), sum(file.stat().st_nlink > 1 for file in files)

    def _take(self, answer: bytes) -> None:
        self.answers += answer


def _map() -> ShardMap:
    return ShardMap({name: TensorShards("float32", (SIZE,), (Shard(Box((0,), (SIZE,)), (0,)),)) for name in NAMES})


def _held(values: dict[str, int]) -> dict[str, list[torch.Tensor]]:
    return {name: [torch.arange(SIZE, dtype=torch.float32) + 10_000 * value] for name, value in values.items()}


def _loaded(path: Path) -> dict[str, int]:
    got = {name: torch.zeros(SIZE) for name in NAMES}
    load(path, {name: (Box((0,), (SIZE,)), tensor) for name, tensor in got.items()})
    values = {name: int(tensor[0]) // 10_000 for name, tensor in got.items()}
    assert all(torch.equal(tensor, _held(values)[name][0]) for name, tensor in got.items())
    return values


def test_what_stays_the_same_is_linked_and_what_does_not_is_written(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    for step in (1, 2, 3, 4):
        run.values["b"] = step
        run.save(step)
    run.check()
    # the first file has a part that changes: what does not gets its own file in the second save, linked from then on
    assert [run.num_files(step) for step in (1, 2, 3, 4)] == [(1, 0), (2, 1), (2, 1), (2, 1)]
    run.save(5)
    assert run.num_files(5) == (2, 2)
    with safe_open(tmp_path / "step-00000005" / "rank-00000.safetensors", "pt") as file:
        assert set(file.keys()) <= set(NAMES)


def test_neighbours_have_files_of_their_own_from_the_first_save_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_files, "_LEAST_FILE_BYTES", SIZE * 4)
    run = _Run(tmp_path)
    run.save(1)
    run.values["e"] = 1
    run.save(2)
    run.check()
    assert run.num_files(2) == (5, 4)


def test_every_checkpoint_is_complete_without_the_others(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    for step in (1, 2, 3):
        run.values["b"] = step
        run.save(step)
    shutil.rmtree(tmp_path / "step-00000001")
    shutil.rmtree(tmp_path / "step-00000002")
    copied = Path(shutil.copytree(tmp_path / "step-00000003", tmp_path / "elsewhere"))
    assert verify(copied).ok
    assert _loaded(copied) == run.values


def test_bytes_that_have_rotted_are_written_anew_and_not_linked(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.save(1)
    file = tmp_path / "step-00000001" / "rank-00000.safetensors"
    rotten = bytearray(file.read_bytes())
    rotten[-5] ^= 1
    file.write_bytes(rotten)
    run.save(2)
    del run.expected[1]
    run.check()
    assert run.num_files(2) == (2, 0), "what has rotted looks like what has changed"
    assert not verify(file.parent).ok


def test_where_links_are_refused_everything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    run = _Run(tmp_path)
    run.save(1)
    run.save(2)
    run.check()
    assert run.num_files(2) == (1, 0)


def test_a_rank_has_a_limited_number_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "MOST_FILES", 3)
    run = _Run(tmp_path)
    for step, name in enumerate("abcdeabcde", start=1):
        run.values[name] = step
        run.save(step)
        assert run.num_files(step)[0] <= 3
    run.check()


class _DyingOs:
    """Raises ``_Killed`` at one call that changes the disk, and at every later one."""

    def __init__(self, call: int) -> None:
        self.left = call
        self.real = {name: getattr(os, name) for name in CHANGES_DISK}

    def __enter__(self) -> None:
        for name, function in self.real.items():
            setattr(os, name, self._wrap(function))

    def __exit__(self, *_: object) -> None:
        for name, function in self.real.items():
            setattr(os, name, function)

    def _wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise _Killed
            return function(*arguments, **keywords)

        return counted


_CHANGES = st.sets(st.sampled_from(NAMES), max_size=3)
_SAVE = st.tuples(st.just("save"), _CHANGES, st.integers(0, 2))
_CRASH = st.tuples(st.just("crash"), _CHANGES, st.integers(0, 45))
_DELETE = st.tuples(st.just("delete"), st.just(frozenset[str]()), st.integers(0, 9))
_RESTART = st.tuples(st.just("restart"), st.just(frozenset[str]()), st.just(0))


def _check_sequence(operations: list[tuple[str, set[str], int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, step = _Run(Path(folder)), 0
        for number, (kind, changes, argument) in enumerate(operations, start=1):
            for name in changes:
                run.values[name] = number
            if kind == "save":
                step = max(1, step + 1 - argument // 2)  # also the same step anew
                run.save(step)
            elif kind == "crash":
                _crash(run, step + 1, argument)
            elif kind == "restart":
                run.restart()
            elif found := sorted(committed_steps(run.directory)):
                removed = found[argument % len(found)]
                remove(run.directory, [removed])
                run.expected.pop(removed, None)
            run.check()
        assert (latest(folder) is None) == (not run.expected)


def _crash(run: _Run, step: int, call: int) -> None:
    """Kill the writer in a save, then start another. The step was there before with other bytes, or was not."""
    before = run.expected.get(step)
    try:
        with _DyingOs(call):
            run.save(step)
    except _Killed:
        path = run.directory / f"step-{step:08d}"
        found = latest(run.directory)
        if path.exists() and found is not None:
            run.expected[step] = _loaded(path)
            assert run.expected[step] in (before, run.values)
        elif before is not None:  # set aside, where latest finds it
            aside = run.directory / f".replaced-{path.name}"
            assert _loaded(aside) == before
            os.rename(aside, path)
    run.restart()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.one_of(_SAVE, _SAVE, _CRASH, _DELETE, _RESTART), min_size=4, max_size=9))
def test_no_sequence_of_saves_deletions_and_crashes_harms_a_checkpoint(
    operations: list[tuple[str, set[str], int]],
) -> None:
    _check_sequence(operations)


@pytest.mark.soak
@pytest.mark.timeout(7200)
@settings(max_examples=1500, deadline=None)
@given(st.lists(st.one_of(_SAVE, _SAVE, _CRASH, _DELETE, _RESTART), min_size=4, max_size=25))
def test_no_long_sequence_of_saves_deletions_and_crashes_harms_a_checkpoint(
    operations: list[tuple[str, set[str], int]],
) -> None:
    _check_sequence(operations)


def test_pruning_tells_first_what_it_would_free_and_leaves_what_others_share(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    for step in range(1, 7):
        run.values["b"] = step
        run.save(step)
    told = prune(tmp_path, Retention(last=1, every=4))
    assert (told.kept, told.removed) == ((4, 6), (1, 2, 3, 5))
    assert sorted(committed_steps(tmp_path)) == [1, 2, 3, 4, 5, 6]
    before = _bytes_on_disk(tmp_path)
    assert prune(tmp_path, Retention(last=1, every=4), dry_run=False) == told
    assert before - _bytes_on_disk(tmp_path) == told.bytes_freed
    run.expected = {step: values for step, values in run.expected.items() if step in told.kept}
    run.check()
    assert prune(tmp_path, Retention(last=1), dry_run=False).removed == (4,)


def test_pruning_by_age_counts_from_the_manifest(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    for step in (1, 2, 3):
        run.save(step)
    for step, age_s in ((1, 7200), (2, 1800)):
        manifest = tmp_path / f"step-{step:08d}" / "manifest.json"
        written_s = manifest.stat().st_mtime - age_s
        os.utime(manifest, (written_s, written_s))
    assert prune(tmp_path, Retention(last=1, younger_than_s=3600)).kept == (2, 3)


def _bytes_on_disk(directory: Path) -> int:
    files = {(status.st_dev, status.st_ino): status.st_size for status in map(os.stat, directory.glob("step-*/*"))}
    return sum(files.values())
