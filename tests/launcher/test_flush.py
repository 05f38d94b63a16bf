"""A job that cannot go on leaves what was in memory alone as a checkpoint, from which it can be resumed in any layout."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from evermesh import checkpoint
from evermesh.fault.events import Event, read_events
from evermesh.fault.snapshot.keeper.area import area_of
from evermesh.fault.snapshot.keeper.slots import SlotFiles, held_by
from evermesh.launcher.contact import keeper_secret, read_token
from evermesh.launcher.controller.work import launch_of
from evermesh.launcher.flushing import Flushed, Order, flush
from tests.checkpoint import states
from tests.cluster import run_ranks
from tests.fault.snapshot.keepers import keeper_of
from tests.fault.snapshot.members import SECRET
from tests.fault.snapshot.test_snapshots import _take
from tests.launcher.jobs import Job, clean_losses, launched
from tests.launcher.test_cli import evermesh
from tests.launcher.test_lost_nodes import lose

ENDLESS, COMPARED = "train.steps=100000", 25
WITHOUT_STORAGE = ("train.checkpoint.every=null", "train.snapshot.every=1")


@pytest.fixture(scope="module")
def expected(job_file_of_module: Path) -> list[float]:
    return clean_losses(job_file_of_module, 100000, f"train.stop_at={COMPARED}", "nodes=2", "train.snapshot=off")


def _wait_in_memory(job: Job, step: int) -> None:
    areas = [area_of(job.run.directory, f"node-{number}") for number in range(2)]
    job.wait(
        lambda: all(
            max((held.record.step for rank in range(2) for held in held_by(area, rank)), default=0) >= step
            for area in areas
        )
    )


def _flushed(job: Job) -> Event:
    (event,) = (event for event in read_events(job.run.events) if event.kind == "flushed")
    return event


def _is_whole_and_resumed(job: Job, expected: list[float]) -> None:
    """What was flushed is a checkpoint like any other, and another number of workers goes on from it."""
    found = checkpoint.checkpoints(job.run.checkpoints)
    assert [one.step for one in found] == [_flushed(job).step]
    assert found[0].step >= 3
    assert "whole" in evermesh("checkpoint", "verify", str(found[0].path)).stdout
    last = max(COMPARED, found[0].step + 5)  # a busy machine may have killed late
    resumed = evermesh("resume", job.run.directory, "--workers", "3", "--nodes", "1", "--set", f"train.stop_at={last}")
    assert resumed.returncode == 0, resumed.stderr
    assert len(job.losses) == last
    assert job.losses[:COMPARED] == pytest.approx(expected, rel=1e-5)
    secret = keeper_secret(read_token(job.run.directory), launch_of(_launched_s(job)))
    for file in [job.run.events, job.run.journal, *job.run.logs.iterdir()]:
        assert secret.hex() not in file.read_text(errors="replace"), file
        assert read_token(job.run.directory) not in file.read_text(errors="replace"), file


def _launched_s(job: Job) -> float:
    return next(entry.time_s for entry in job.journal if entry.kind == "launch")


def test_a_job_without_restarts_left_writes_down_what_is_in_memory(job_file: Path, expected: list[float]) -> None:
    with launched(job_file, ENDLESS, "nodes=2", "restarts=0", *WITHOUT_STORAGE) as job:
        job.wait_training()
        _wait_in_memory(job, 3)
        job.kill_rank(1)
        code, _, stderr = job.end()
        assert code == 1, stderr
        _is_whole_and_resumed(job, expected)


def test_f10_a_job_that_waited_in_vain_for_a_node_writes_down_what_is_in_memory_and_asks_to_be_run_again(
    job_file: Path, expected: list[float]
) -> None:
    """The machine is gone with its memory, of which the other node has copies. It needs both nodes, and has no spare."""
    copies = "train.layout.sharding.states=1"
    with launched(job_file, ENDLESS, "nodes=2", "join_timeout_s=25", copies, *WITHOUT_STORAGE) as job:
        job.wait_training()
        _wait_in_memory(job, 3)
        with _nobody_comes_back(job, "node-1", loses_memory=True):
            job.wait(lambda: job.client.status().state == "waiting")
            newest = max(held.record.step for held in held_by(area_of(job.run.directory, "node-0"), 0))
            code, stdout, stderr = job.end()
        assert code == 75, stderr
        assert job.run.state().exit_code == 75
        assert _flushed(job).step == newest, "nothing is lost that was in memory"
        assert _flushed(job).text in stdout
        assert "rank 1 was lost with node-1. 1 of 2 nodes were there after 25 s (join_timeout_s). Wait for" in stderr
        assert (
            stderr.rstrip().splitlines()[-1].startswith(f"The newest checkpoint is step-{newest:08}; go on from there")
        )
        _is_whole_and_resumed(job, expected)


@contextmanager
def _nobody_comes_back(job: Job, node: str, *, loses_memory: bool = False) -> Iterator[list[psutil.Process]]:
    """Every agent that is started for a node from now on stands still before it joins; its keeper lives, or its memory is
    gone with it."""
    before, run = job.agents[node], str(job.run.directory.absolute())
    stopped: list[psutil.Process] = []

    def stop_the_next() -> bool:
        for process in psutil.process_iter(["pid", "cmdline"]):
            line = process.info["cmdline"] or []
            if (
                process.pid != before
                and "evermesh.launcher.agent" in line
                and any(f'"{node}"' in part and f'"{run}"' in part for part in line)
            ):
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
                    stopped.append(process)
                    return True
        return False

    if loses_memory:
        lose(job, int(node.removeprefix("node-")))
    with suppress(psutil.NoSuchProcess):  # it may be gone already
        psutil.Process(before).kill()
    try:
        job.wait(stop_the_next)
        yield stopped
    finally:
        for process in stopped:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def test_the_newest_whole_snapshot_is_written_and_none_that_storage_has_surpassed(tmp_path: Path) -> None:
    nodes, directory = (0, 0, 1, 1), tmp_path / "checkpoints"
    with ExitStack() as stack:
        keepers = [stack.enter_context(keeper_of(tmp_path, f"node-{node}", secret=SECRET)) for node in range(2)]
        run_ranks(4, _take, str(tmp_path), nodes, (4, 9), 1)
        addresses = tuple((one.address.host, one.address.port) for one in keepers if one.address is not None)
        order = Order(keepers=addresses, launch="launch", secret=SECRET.hex(), newer_than=9)
        assert flush(directory, order) == Flushed()
        assert checkpoint.latest(directory) is None
        wrong = order.model_copy(update={"newer_than": -1, "secret": b"another secret of a job".hex()})
        told = flush(directory, wrong)
        assert (told.step, len(told.problems)) == (None, 2)
        area = keepers[1].area
        (held,) = (one for one in held_by(area, 3) if one.record.step == 9)
        data = SlotFiles.of(area, 3, held.number).data
        content = bytearray(data.read_bytes())
        content[-50] ^= 1
        data.write_bytes(content)
        told = flush(directory, order.model_copy(update={"newer_than": -1}))
        assert told.step == 4
        assert "the checksum is wrong" in told.problems[0]
        assert [one.step for one in checkpoint.checkpoints(directory)] == [4], "what failed is not visible"
        content[-50] ^= 1
        data.write_bytes(content)
        told = flush(directory, order.model_copy(update={"newer_than": 4}))
        assert (told.step, told.problems) == (9, ())
        path = checkpoint.latest(directory)
        assert path is not None
        assert checkpoint.verify(path).ok
        for world_size in (1, 3, 4):
            for result in states.load_and_compare(path, 9, world_size):
                assert (result.objects, result.description) == ({"step": 9}, {"model": "small"})
