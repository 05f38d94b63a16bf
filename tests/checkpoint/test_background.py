"""A state is saved while its owner goes on: the bytes are those of the moment, errors reach all ranks, nothing is left."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from evermesh.checkpoint import (
    BackgroundSaver,
    CheckpointNotSaved,
    HostMemoryShort,
    ShardMapInvalid,
    latest,
    save,
    verify,
)
from evermesh.checkpoint.background import memory
from evermesh.checkpoint.stores.places import Place
from evermesh.parallelism.collectives import Communicator
from tests.checkpoint.states import held_by, load_and_compare, logical_state, save_step, shard_map
from tests.checkpoint.test_full_disk import can_mount
from tests.cluster import run_ranks

OBJECTS: dict[str, Any] = {"cursor": {"samples": 8}, "best": float("inf")}


def _saver(
    directory: Place, rank: int, size: int, **options: Any
) -> tuple[BackgroundSaver, dict[str, list[torch.Tensor]]]:
    held = held_by(rank, size, logical_state(1))
    communicator = Communicator(dist.group.WORLD) if size > 1 else None
    return BackgroundSaver(directory, shard_map(size), held, communicator=communicator, **options), held


def _fill(held: dict[str, list[torch.Tensor]], other: dict[str, list[torch.Tensor]]) -> None:
    for name, tensors in held.items():
        for tensor, values in zip(tensors, other[name], strict=True):
            tensor.copy_(values)


def _save_while_it_changes(rank: int, size: int, directory: str) -> None:
    saver, held = _saver(Path(directory), rank, size)
    with saver:
        for step in (1, 2, 3):  # each save but the first has to wait for the one before
            _fill(held, held_by(rank, size, logical_state(step)))
            before = saver.begin(step, OBJECTS, {"model": "test"})
            assert (before.step if before else None) == (step - 1 or None)
            _fill(held, held_by(rank, size, logical_state(99)))  # training goes on
        assert saver.finish() is not None
        assert saver.finish() is None


def _save_at_once(rank: int, size: int, directory: str) -> None:
    held = held_by(rank, size, logical_state(3))
    tap = Communicator(dist.group.WORLD)
    save(Path(directory), 3, shard_map(size), held, OBJECTS, communicator=tap, description={"model": "test"})


def test_the_bytes_are_those_of_the_moment_of_the_copy_and_the_checkpoint_is_that_of_an_ordinary_save(
    tmp_path: Path,
) -> None:
    run_ranks(3, _save_while_it_changes, str(tmp_path / "behind"))
    run_ranks(3, _save_at_once, str(tmp_path / "at once"))
    assert sorted(path.name for path in (tmp_path / "behind").iterdir()) == ["latest", "step-00000002", "step-00000003"]
    load_and_compare(tmp_path / "behind" / "step-00000002", 2, 4)
    path = latest(tmp_path / "behind")
    assert path is not None
    assert verify(path).ok
    load_and_compare(path, 3, 2)
    ours, theirs = (_manifest(tmp_path / kind / path.name) for kind in ("behind", "at once"))
    assert ours == theirs
    for file in sorted(path.glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "at once" / path.name / file.name).read_bytes()


def _manifest(path: Path) -> str:
    values = json.loads((path / "manifest.json").read_text())
    return json.dumps({key: value for key, value in values.items() if key not in ("xxh3_64", "time_s")})


def _writer(saver: BackgroundSaver) -> int:
    assert saver._writer is not None
    return saver._writer.pid


def _lose_a_writer(rank: int, size: int, directory: str) -> list[str]:
    saver, _ = _saver(Path(directory), rank, size)
    told = []
    with saver:
        saver.begin(1, OBJECTS)
        saver.finish()
        if rank == 1:
            os.kill(_writer(saver), signal.SIGSTOP)
        saver.begin(2, OBJECTS)
        if rank == 1:
            os.kill(_writer(saver), signal.SIGKILL)
            while saver.look():
                time.sleep(0.01)
        try:
            saver.begin(3, OBJECTS)
        except CheckpointNotSaved as error:
            told = [str(error), *sorted(path.name for path in Path(directory).iterdir())]
        assert not saver.is_busy
        saver.begin(4, OBJECTS)
        saver.finish()
    return told


def test_a_writer_that_was_killed_is_told_by_all_ranks_and_the_next_save_works(tmp_path: Path) -> None:
    for told in run_ranks(3, _lose_a_writer, str(tmp_path)):
        assert "step 2 was not saved" in told[0]
        assert (
            "rank 1: ChildProcessError: the process that writes the checkpoint has ended (killed by signal 9)"
            in told[0]
        )
        assert told[1:] == ["latest", "step-00000001"]
    path = latest(tmp_path)
    assert path is not None
    assert path.name == "step-00000004"
    load_and_compare(path, 1, 2)


def _be_refused(rank: int, size: int, directory: str) -> tuple[int, int | None, str]:
    saver, _ = _saver(Path(directory), rank, size)
    with saver:
        if rank == 2:
            resource.prlimit(_writer(saver), resource.RLIMIT_FSIZE, (100_000, 100_000))
        saver.begin(2, OBJECTS)
        with pytest.raises(CheckpointNotSaved) as caught:
            saver.finish()
    return caught.value.rank, caught.value.errno, str(caught.value)


def test_a_write_that_one_writer_is_refused_is_told_by_all_ranks(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    answers = run_ranks(4, _be_refused, str(tmp_path))
    for rank, number, text in answers:
        assert rank == 2
        assert number == errno.EFBIG
        assert "File too large" in text
    assert sorted(found.name for found in tmp_path.iterdir()) == ["latest", path.name]
    load_and_compare(path, 1, 2)


def test_without_room_in_shared_memory_a_saver_is_refused_with_the_numbers(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("mounting a tmpfs in a user namespace is not permitted here (unshare -Urm)")
    program = (
        "import subprocess; from pathlib import Path\n"
        "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'none', '/dev/shm'], check=True)\n"
        "from tests.checkpoint.test_background import _saver\n"
        f"_saver(Path({str(tmp_path / 'new')!r}), 0, 1)"
    )
    command = ["unshare", "-Urm", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 1
    needed = sum(tensor.numel() * tensor.element_size() for tensor in logical_state(1).values())
    assert f"HostMemoryShort: saving in the background needs {needed:,} bytes" in done.stderr
    assert "/dev/shm: No space left on device" in done.stderr
    assert not (tmp_path / "new").exists()


def _run_short_of_memory(rank: int, size: int, directory: str) -> str:
    if rank == 1:
        memory.available_bytes = lambda: (1 << 20, 1 << 30)
    with pytest.raises(HostMemoryShort) as caught:
        _saver(Path(directory), rank, size)
    return str(caught.value)


def test_one_rank_without_memory_is_told_by_all(tmp_path: Path) -> None:
    for told in run_ranks(2, _run_short_of_memory, str(tmp_path)):
        assert "1/16 of memory must stay free" in told
        assert "train.checkpoint.asynchronous" in told


def test_tensors_that_do_not_fit_the_map_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardMapInvalid, match="do not fit the shard map"):
        BackgroundSaver(tmp_path, shard_map(1), {})


def test_objects_that_are_no_json_fail_the_save(tmp_path: Path) -> None:
    saver, _ = _saver(tmp_path, 0, 1)
    with saver:
        saver.begin(1, {"a": torch.zeros(1)})  # type: ignore[dict-item]
        assert not saver.look()
        with pytest.raises(CheckpointNotSaved, match="input was not a valid JSON value"):
            saver.finish()
    assert latest(tmp_path) is None


def _hold_a_saver(rank: int, size: int, directory: str) -> None:
    saver, _ = _saver(Path(directory), rank, 1)
    saver.begin(1, OBJECTS)
    saver.finish()
    pid = _writer(saver)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)  # as Ctrl-C and the end of a container do; meant for the trainer
    saver.begin(2, OBJECTS)
    saver.finish()
    Path(directory, "pid").write_text(str(pid))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_writer_outlives_signals_to_its_group_but_not_its_trainer(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="ended without an answer"):
        run_ranks(1, _hold_a_saver, str(tmp_path))
    pid = int((tmp_path / "pid").read_text())
    deadline_s = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and "zombie" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline_s, "the writer outlived its trainer"
        time.sleep(0.01)
    assert latest(tmp_path) == tmp_path / "step-00000002"


def test_the_writer_loads_neither_torch_nor_numpy_nor_a_client_of_stores() -> None:
    program = (
        "import sys, evermesh.checkpoint.background.writer; "
        "print({'torch', 'numpy', 'pydantic', 'fsspec', 's3fs'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
