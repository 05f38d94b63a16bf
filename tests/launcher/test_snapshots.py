"""Jobs whose workers, agents and keepers are killed go on from the memory of their nodes. No checkpoint is ever written."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from evermesh import checkpoint
from evermesh.fault.events import Event, read_events
from evermesh.fault.snapshot.keeper.area import AgentMark, area_of, identity_in
from evermesh.fault.snapshot.keeper.slots import held_by
from evermesh.launcher.summary import summary_table
from tests.launcher.jobs import Job, clean_losses, launched

ENDLESS, COMPARED = "train.steps=100000", 25
WITHOUT_STORAGE = ("train.checkpoint.every=null", "train.snapshot.every=1")


@pytest.fixture(scope="module")
def expected(job_file_of_module: Path) -> list[float]:
    return clean_losses(job_file_of_module, 100000, f"train.stop_at={COMPARED}", "nodes=2", "train.snapshot=off")


def _areas(job: Job, nodes: int) -> list[Path]:
    return [area_of(job.run.directory, f"node-{number}") for number in range(nodes)]


def _resumed(job: Job) -> list[Event]:
    return [event for event in read_events(job.run.events) if event.kind == "resumed"]


def _wait_in_memory(job: Job, nodes: int, step: int) -> None:
    """Wait until all nodes have a snapshot of ``step`` or later."""
    areas = _areas(job, nodes)
    held = lambda area: [held.record.step for rank in range(2) for held in held_by(area, rank)]  # noqa: E731
    job.wait(lambda: all(max(held(area), default=0) >= step for area in areas))


def _stop(job: Job) -> str:
    """Train as far as is compared, then save for the first time; the output."""
    job.wait(lambda: len(job.losses) >= COMPARED)
    job.process.send_signal(signal.SIGTERM)
    code, stdout, stderr = job.end()
    assert code == 143, stderr
    return stdout


def _assert_went_on_from_memory(job: Job, attempts: int, stdout: str, losses: list[float]) -> None:
    assert job.run.state().attempt == attempts
    assert [event.fields["source"] for event in _resumed(job)] == ["memory"] * (attempts - 1)
    told = [event for event in read_events(job.run.events) if event.kind == "restarted"]
    assert all(int(str(event.fields["lost_steps"])) >= 0 for event in told)
    assert job.losses[:COMPARED] == losses
    assert len(checkpoint.checkpoints(job.run.checkpoints)) == 1, "only at the end"
    assert "Going on from step" in stdout


def _assert_nothing_is_left(areas: list[Path], keepers: list[int]) -> None:
    until = time.monotonic() + 10
    while any(area.exists() for area in areas) or any(map(psutil.pid_exists, keepers)):
        assert time.monotonic() < until, [area for area in areas if area.exists()]
        time.sleep(0.02)


def test_f1_f6_a_killed_worker_and_a_killed_keeper_cost_no_read_of_storage(
    job_file: Path, expected: list[float]
) -> None:
    with launched(job_file, ENDLESS, "nodes=2", *WITHOUT_STORAGE) as job:
        job.wait_training()
        _wait_in_memory(job, 2, 3)
        areas = _areas(job, 2)
        first = identity_in(areas[0])
        assert first is not None
        os.kill(first.pid, signal.SIGKILL)
        job.wait(lambda: (found := identity_in(areas[0])) is not None and found.is_alive and found != first)
        _wait_in_memory(job, 2, max(len(job.losses), 3))  # the next keeper makes snapshots too
        job.kill_rank(1)
        job.wait(lambda: len(_resumed(job)) == 1)
        stdout = _stop(job)
        _assert_went_on_from_memory(job, 2, stdout, expected)
        assert "in memory" in stdout
        rows = dict(zip(*(column._cells for column in summary_table(job.run).columns), strict=True))
        assert str(rows["restarts"]).startswith("1, ")
        assert "1 from memory" in str(rows["restarts"])
        _assert_nothing_is_left(areas, [first.pid])


def test_f5_f26_the_keeper_of_a_killed_agent_is_found_by_the_next_and_all_workers_at_once_cost_as_little(
    job_file: Path, expected: list[float]
) -> None:
    with launched(job_file, ENDLESS, "nodes=2", *WITHOUT_STORAGE) as job:
        job.wait_training()
        _wait_in_memory(job, 2, 3)
        areas = _areas(job, 2)
        keepers = [found.pid for found in map(identity_in, areas) if found is not None]
        psutil.Process(job.agents["node-1"]).kill()
        job.wait(lambda: len(_resumed(job)) == 1)
        assert [found.pid for found in map(identity_in, areas) if found is not None] == keepers
        job.wait_training(2)
        for pid in job.pids.values():
            os.kill(pid, signal.SIGKILL)
        job.wait(lambda: len(_resumed(job)) == 2)
        stdout = _stop(job)
        _assert_went_on_from_memory(job, 3, stdout, expected)
        _assert_nothing_is_left(areas, keepers)


def test_three_attempts_that_get_on_in_memory_are_progress(job_file: Path) -> None:
    with launched(job_file, ENDLESS, *WITHOUT_STORAGE, "restarts=9") as job:
        for generation in (1, 2, 3, 4):
            job.wait_training(generation)
            _wait_in_memory(job, 1, _newest(job) + 3)
            job.kill_rank(1)
        job.wait_training(5)
        job.process.send_signal(signal.SIGTERM)
        assert job.end()[0] == 143
        steps = [int(str(event.step)) for event in _resumed(job)]
        assert steps == sorted(set(steps))
        assert len(steps) == 4


def _newest(job: Job) -> int:
    return max((held.record.step for held in held_by(_areas(job, 1)[0], 0)), default=0)


def test_a_node_without_a_keeper_costs_snapshots_and_gets_one_as_soon_as_it_can(job_file: Path) -> None:
    run = job_file.parent / "runs" / "small"
    held = AgentMark(area_of(run, "node-1"))  # as by an agent that has not gone yet
    with launched(job_file, ENDLESS, "nodes=2", *WITHOUT_STORAGE) as job:
        job.wait_training()
        told = [event.text for event in read_events(job.run.events) if event.kind == "memory"]
        assert any("no snapshots are made" in text and "no keeper listens" in text for text in told)
        held.close()
        job.wait(lambda: "keeper lost" in job.events)
        text = next(event.text for event in read_events(job.run.events) if event.kind == "keeper lost")
        assert "could not be started" in text
        assert "it is there now" in text
        job.kill_rank(0)
        job.wait(lambda: "snapshots protected" in job.events)
        assert job.run.state().attempt == 2
        job.process.send_signal(signal.SIGTERM)
        assert job.end()[0] == 143
