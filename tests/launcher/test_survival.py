"""What a job survives: its workers, an agent, its controller, who watches it, and the clock. The fault matrix.

Losses are compared bit for bit with those of a run that nothing happened to.
"""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from evermesh import checkpoint
from evermesh.fault.events import read_events
from evermesh.runtime.telemetry import read_telemetry
from tests.launcher.jobs import clean_losses, launched
from tests.processes import still_alive

STEPS = 300
ENOUGH = 120
"""Steps after which a job that needs no more stops; the schedule is that of all."""
KEEPER = "evermesh.fault.snapshot.keeper"
"""The module that a keeper runs; it outlives its agent."""
ENDLESS = "train.steps=100000"


@pytest.fixture(scope="module")
def expected(job_file_of_module: Path) -> list[float]:
    return clean_losses(job_file_of_module, STEPS, "nodes=2")


def test_f1_a_killed_worker_is_noticed_at_once_and_the_losses_are_those_of_a_clean_run(
    job_file: Path, expected: list[float]
) -> None:
    with launched(
        job_file, f"train.steps={STEPS}", f"train.stop_at={ENOUGH}", "nodes=2", "train.checkpoint.every=10"
    ) as job:
        job.wait_training()
        job.wait_checkpoint()
        killed_s = job.kill_rank(1)
        code, stdout, stderr = job.end()
        assert code == 0, stderr
        decided = next(entry for entry in job.journal if entry.fields.get("to") == "recovering")
        assert decided.time_s - killed_s < 1  # 0.02 on an idle machine; no timeout is as short
        assert decided.reason == "rank 1 was killed by signal 9 (SIGKILL)"
        assert job.losses == expected[:ENOUGH]
        assert job.run.state().attempt == 2
        assert {"failed", "restarted", "resumed"} <= set(job.events)
    assert "worker 1 was killed by signal 9 (SIGKILL). Going on from step" in stdout


def test_f5_an_agent_that_is_killed_takes_its_workers_with_it_and_another_goes_on(
    job_file: Path, expected: list[float]
) -> None:
    with launched(
        job_file, f"train.steps={STEPS}", f"train.stop_at={ENOUGH}", "nodes=2", "train.checkpoint.every=10"
    ) as job:
        job.wait_training()
        job.wait_checkpoint()
        agent = psutil.Process(job.agents["node-1"])
        children = agent.children(recursive=True)
        keepers = [process for process in children if KEEPER in process.cmdline()]
        family = [process for process in children if process not in keepers]
        assert len(family) >= 2  # a worker and the warm process
        agent.kill()
        assert still_alive(family, 2) == []
        assert [keeper.is_running() for keeper in keepers] == [True]
        code, stdout, stderr = job.end()
        assert code == 0, stderr
        assert "lost node-1. Going on from step" in stdout
        assert job.losses == expected[:ENOUGH]


def test_f7_a_rank_that_is_stopped_for_good_is_found_from_outside_and_one_that_goes_on_in_time_is_left_alone(
    job_file: Path, expected: list[float]
) -> None:
    with launched(
        job_file, f"train.steps={STEPS}", f"train.stop_at={ENOUGH}", "nodes=2", "train.checkpoint.every=10"
    ) as job:
        rank = psutil.Process(job.wait_training().ranks[1].pid)
        job.wait_checkpoint()
        rank.suspend()
        time.sleep(1.0)
        rank.resume()
        steps = len(job.losses)
        job.wait(lambda: len(job.losses) > steps + 5)
        assert job.client.status().generation == 1
        rank.suspend()
        stopped_s = time.time()
        job.wait_training(2)
        again = next(entry for entry in job.journal if entry.fields.get("to") == "training" and entry.generation == 2)
        assert again.time_s - stopped_s < 30  # 4 on an idle machine
        told = {event.kind: event for event in read_events(job.run.events)}
        assert "worker 1 has been stopped for 2." in told["failed"].text
        doing = told["stacks"].fields["doing"]
        assert isinstance(doing, dict)
        assert sorted(doing) == ["0", "1"]
        assert all(doing.values())
        code, stdout, stderr = job.end()
        assert code == 0, stderr
        assert job.losses == expected[:ENOUGH]
        assert "  rank 1 w" in stdout


def test_f16_an_agent_cut_off_from_the_controller_trains_on_and_is_taken_back(job_file: Path) -> None:
    with launched(job_file, ENDLESS, "nodes=2", "train.checkpoint.every=10") as job:
        job.wait_training()
        agent = psutil.Process(job.agents["node-1"])
        agent.suspend()  # its workers train on; the controller hears nothing, as behind a cut
        job.wait(lambda: any(node.state == "cut off" for node in job.client.status().nodes), 10)
        before = len(job.losses)
        job.wait(lambda: len(job.losses) > before + 10)
        agent.resume()
        job.wait(lambda: all(node.state == "ready" for node in job.client.status().nodes), 10)
        assert {"node cut off", "node back"} <= set(job.events)
        assert job.client.status().generation == 1


def test_f22_training_goes_on_while_the_controller_is_dead_and_another_takes_over_within_2_s(
    job_file: Path, expected: list[float]
) -> None:
    with launched(job_file, f"train.steps={STEPS}", "nodes=2", "train.checkpoint.every=10") as job:
        job.wait_training()
        first = job.run.state().pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        killed_s, steps = time.monotonic(), len(job.losses)
        job.wait(lambda: job.run.is_alive(), 10)
        job.client.status()
        assert time.monotonic() - killed_s < 4  # 2 on an idle machine
        assert len(job.losses) > steps
        job.kill_rank(0)  # the new one can do all that the old one could
        code, _, stderr = job.end()
        assert code == 0, stderr
        assert job.run.state().pid != first
        assert job.run.state().attempt == 2
        assert job.losses == expected


def test_f24_sigterm_saves_within_its_grace_and_ends_with_143(job_file: Path) -> None:
    with launched(job_file, ENDLESS, "train.checkpoint.every=null") as job:
        job.wait_training()
        members = job.processes()
        job.process.send_signal(signal.SIGTERM)
        asked_s = time.time()
        code, _, stderr = job.end(25)
        assert (code, stderr) == (143, "")
        asked = next(entry for entry in job.journal if entry.kind == "stop")
        assert asked.time_s - asked_s < 1  # 0.01 on an idle machine
        saved = checkpoint.checkpoints(job.run.checkpoints)[-1]
        assert saved.step == read_telemetry(job.run.telemetry)[-1].step
        assert still_alive(members, 3) == []


def test_f24_with_requeue_on_term_it_ends_with_75(job_file: Path) -> None:
    with launched(job_file, ENDLESS, "requeue_on_term=true") as job:
        job.wait_training()
        job.process.send_signal(signal.SIGTERM)
        assert job.end(25)[0] == 75


def test_f24_what_does_not_stop_in_its_grace_is_ended(job_file: Path) -> None:
    with launched(job_file, ENDLESS, "grace_s=1", "train.checkpoint.every=null") as job:
        status = job.wait_training()
        psutil.Process(status.ranks[1].pid).suspend()
        members = job.processes()
        job.process.send_signal(signal.SIGTERM)
        code, _, stderr = job.end(10)
        assert code == 143
        assert "at once, without a save" in stderr
        assert still_alive(members, 3) == []


def test_f25_sigusr1_saves_and_training_goes_on(job_file: Path) -> None:
    with launched(job_file, ENDLESS, "train.checkpoint.every=null") as job:
        job.wait_training()
        job.process.send_signal(signal.SIGUSR1)
        job.wait_checkpoint()
        steps = len(job.losses)
        job.wait(lambda: len(job.losses) > steps + 5)
        assert job.client.status().state == "training"
