"""A save to an object store that is killed at any request leaves the previous checkpoint or the new one, and no rubbish; an
upload that was interrupted goes on where it was."""

import multiprocessing
import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from evermesh import checkpoint
from evermesh.checkpoint import BackgroundSaver, Box, CheckpointNotSaved, Shard, ShardMap, TensorShards
from evermesh.checkpoint.committing import Attempt, prepare
from evermesh.checkpoint.stores.attempts import folder_of
from evermesh.checkpoint.stores.places import ObjectPath
from evermesh.checkpoint.stores.s3 import PART_BYTES, S3Store
from evermesh.checkpoint.stores.store import objects_of
from evermesh.parallelism.collectives import Communicator
from tests.checkpoint.fault_proxy import Fault, Weather
from tests.checkpoint.killing import NEW_STATE, OLD_STATE, state_of_latest
from tests.checkpoint.object_store import TestStore, adopt
from tests.checkpoint.states import load_and_compare, save_step
from tests.cluster import preload, run_ranks

preload("s3fs", "tests.checkpoint.object_store")
_CONTEXT = multiprocessing.get_context("forkserver")
_OLD_STEP, _NEW_STEP = 1, 2


class _Killer:
    """Kills a process at one of its requests: before the store hears of it, or before it hears of the store."""

    def __init__(self, request: int, *, is_done: bool) -> None:
        self._request, self._is_done, self._num_requests = request, is_done, 0
        self.has_killed = False
        self.pid: int | None = None
        self._is_known = threading.Event()

    def aim(self, pid: int) -> None:
        self.pid = pid
        self._is_known.set()

    def choose(self, method: str, target: str) -> Fault | None:
        self._is_known.wait()
        self._num_requests += 1
        if self._num_requests <= self._request or self.has_killed:
            return None
        assert self.pid is not None
        os.kill(self.pid, signal.SIGKILL)
        self.has_killed = True
        return "lose answer" if self._is_done else "cut request"


def _save(environment: dict[str, str], place: ObjectPath, step: int) -> None:
    adopt(environment)
    save_step(place, step, keep=1, state=NEW_STATE)


def _save_and_die(store: TestStore, place: ObjectPath, step: int, killer: _Killer) -> None:
    process = _CONTEXT.Process(target=_save, args=(store.environment, place, step))
    store.proxy.weather = Weather(choose=killer.choose)
    process.start()
    assert process.pid is not None
    killer.aim(process.pid)
    process.join()
    store.clear_up()


def _is_in_order(place: ObjectPath) -> None:
    """Another save reclaims whatever is left."""
    path = save_step(place, 3, keep=1)
    load_and_compare(path, 3, 1)
    files = folder_of(path)
    client = objects_of(place)
    expected = {"latest", "step-00000003/committed"}
    expected |= {
        f"step-00000003/{files.name}/{name}" for name in ("manifest.json", "rank-00000.index", "rank-00000.safetensors")
    }
    assert set(client.sizes(place)) == expected
    assert isinstance(client, S3Store)
    assert not list(client.uploads(place))


@pytest.mark.parametrize(
    ("step", "is_done", "every"),
    [
        (_NEW_STEP, True, 7),
        *(
            pytest.param(step, is_done, 1, marks=pytest.mark.parity)
            for step in (_OLD_STEP, _NEW_STEP)
            for is_done in (True, False)
        ),
    ],
)
def test_a_save_killed_at_any_request_leaves_the_old_or_the_new_checkpoint(
    store: TestStore, step: int, is_done: bool, every: int
) -> None:
    found = []
    for request in range(0, 100, every):
        place, killer = store.place(), _Killer(request, is_done=is_done)
        save_step(place, _OLD_STEP, keep=1, state=OLD_STATE)
        _save_and_die(store, place, step, killer)
        found.append(state_of_latest(place))
        _is_in_order(place)
        if not killer.has_killed:
            break
    else:
        raise AssertionError("a save has endlessly many requests")
    assert found[0] == OLD_STATE
    assert found[-1] == NEW_STATE
    assert found == sorted(found), "a state came back"
    assert len(found) >= 15 // every


_LARGE = 5 * PART_BYTES // 4 + 1000  # elements: five parts and a piece


def _large_map() -> ShardMap:
    return ShardMap({"w": TensorShards("float32", (_LARGE,), (Shard(Box((0,), (_LARGE,)), (0,)),))})


def _loaded(path: ObjectPath) -> torch.Tensor:
    found = torch.empty(_LARGE)
    checkpoint.load(path, {"w": (Box((0,), (_LARGE,)), found)})
    return found


def test_an_upload_goes_on_where_the_writer_was_killed(store: TestStore) -> None:
    place, values = store.place(), torch.arange(_LARGE, dtype=torch.float32)
    with BackgroundSaver(place, _large_map(), {"w": values}) as saver:
        assert saver._writer is not None
        first, uploads = saver._writer.pid, 0

        def choose(method: str, target: str) -> Fault | None:
            nonlocal uploads
            uploads += "partNumber" in target
            if uploads == 4 and method == "PUT":
                uploads += 1
                os.kill(first, signal.SIGKILL)
                return "cut request"
            return None

        store.proxy.weather = Weather(choose=choose)
        saver.begin(1, {})
        report = saver.finish()
        assert saver._writer.pid != first
    assert report is not None
    assert torch.equal(_loaded(place / "step-00000001"), values)
    assert checkpoint.verify(place / "step-00000001").ok
    parts = store.proxy.count("PUT", "partNumber")
    assert 6 < parts < 12, "six parts, again those that were on their way when it was killed, and none of the others"
    assert store.proxy.count("POST", r"\?uploads$") == 1, "one upload was begun"
    assert store.proxy.count("GET", "uploadId=") == 1, "its parts were listed"


@pytest.mark.parity
def test_an_upload_whose_connections_are_cut_repeats_single_parts(store: TestStore) -> None:
    place, values = store.place(), torch.arange(_LARGE, dtype=torch.float32)
    cut: list[str] = []

    def choose(method: str, target: str) -> Fault | None:
        if "uploadId" not in target or len(cut) == 5 or target in cut:
            return None
        cut.append(target)
        return ("cut request", "lose answer", "503")[len(cut) % 3]

    store.proxy.weather = Weather(choose=choose)
    checkpoint.save(place, 1, _large_map(), {"w": values}, {})
    assert len(cut) == 5
    assert torch.equal(_loaded(place / "step-00000001"), values)
    finishing = store.proxy.count("POST", "uploadId=")
    assert store.proxy.count("PUT", "partNumber") + finishing == 6 + 1 + 5


@pytest.mark.parity
def test_the_end_of_an_upload_whose_answer_was_lost_is_found(store: TestStore) -> None:
    place, values = store.place(), torch.arange(_LARGE, dtype=torch.float32)
    lost: list[str] = []

    def choose(method: str, target: str) -> Fault | None:
        if method == "POST" and "uploadId" in target and not lost:
            lost.append(target)
            return "lose answer"
        return None

    store.proxy.weather = Weather(choose=choose)
    checkpoint.save(place, 1, _large_map(), {"w": values}, {})
    assert lost
    assert torch.equal(_loaded(place / "step-00000001"), values)


def test_what_others_upload_below_the_same_prefix_is_left_alone(store: TestStore) -> None:
    place = store.place()
    client: Any = objects_of(place)
    other = place / "step-00000001" / "notes"
    client.call(other, "beginning", "create_multipart_upload", Key=other.key)
    ours = place / "step-00000001" / "attempt-x" / "rank-00000.safetensors"
    client.call(ours, "beginning", "create_multipart_upload", Key=ours.key)
    prepare(Attempt(place, 1, "y"))
    assert [upload["Key"] for upload in client.uploads(place)] == [other.key]


def _save_on_ranks(rank: int, size: int, environment: dict[str, str], place: ObjectPath) -> str:
    from tests.checkpoint.states import held_by, logical_state
    from tests.checkpoint.test_background import _fill, _saver

    adopt(environment)
    saver, held = _saver(place, rank, size)
    with saver:
        for step in (1, 2, 3):
            _fill(held, held_by(rank, size, logical_state(step)))
            saver.begin(step, {"step": step})
            _fill(held, held_by(rank, size, logical_state(99)))
            if rank == 1 and step == 2:
                assert saver._writer is not None
                os.kill(saver._writer.pid, signal.SIGKILL)
        saver.finish()
    save_step(place, 4, Communicator(dist.group.WORLD))
    return str(saver.path_of(3))


def test_ranks_save_while_they_go_on_and_one_writer_is_replaced(store: TestStore) -> None:
    place = store.place()
    assert set(run_ranks(2, _save_on_ranks, store.environment, place)) == {f"{place}/step-00000003"}
    assert [found.step for found in checkpoint.checkpoints(place)] == [3, 4]
    for step in (3, 4):
        assert checkpoint.verify(place / f"step-0000000{step}").ok
        load_and_compare(place / f"step-0000000{step}", step, 3)


def test_a_writer_that_cannot_reach_the_store_ends_the_save_and_the_older_checkpoint_is_named(store: TestStore) -> None:
    place, values = store.place(patience_s=1.0), torch.arange(1000, dtype=torch.float32)
    whole = ShardMap({"w": TensorShards("float32", (1000,), (Shard(Box((0,), (1000,)), (0,)),))})
    with BackgroundSaver(place, whole, {"w": values}) as saver:
        saver.begin(1, {})
        saver.finish()
        store.proxy.weather = Weather(choose=lambda method, target: "503" if method == "PUT" else None)
        began_s = time.monotonic()
        saver.begin(2, {})
        with pytest.raises(CheckpointNotSaved, match=r"tried \d+ times .* the newest is step-00000001"):
            saver.finish()
        assert time.monotonic() - began_s < 15
        store.clear_up()
        saver.begin(3, {})
        saver.finish()
    assert [found.step for found in checkpoint.checkpoints(place)] == [1, 3]
