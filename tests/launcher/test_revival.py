"""Who starts a dead controller again, and when."""

import time
from pathlib import Path

import pytest

from evermesh.launcher import Run
from evermesh.launcher.agent import revival
from evermesh.launcher.job_file import load_job
from evermesh.launcher.run_directory import RunState


@pytest.fixture
def run(job_file: Path) -> Run:
    made = Run.create(load_job(job_file))
    made.write_state(RunState(state="running", workers=2))
    return made


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    runs: list[Run] = []
    monkeypatch.setattr(revival, "start_controller_apart", runs.append)
    return runs


def test_who_shows_a_job_starts_its_dead_controller_again_after_a_second(run: Run, started: list[Run]) -> None:
    watcher = revival.Revival(run.directory, None)
    watcher.consider(0.9)
    assert started == []
    watcher.consider(1.1)
    watcher.consider(1.2)  # that one is still starting
    assert started == [run]


def test_a_controller_that_came_and_died_is_started_again_at_once_but_not_for_ever(
    run: Run, started: list[Run]
) -> None:
    agent = revival.Revival(run.directory, "node-0")
    for number in range(1, 13):
        agent.consider(0.21)
        assert len(started) == min(number, 10)
        time.sleep(0.22)  # it was there, for a moment
