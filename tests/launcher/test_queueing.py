"""What needs no Slurm: how its answers are read, when a job stops before its limit, when it may be queued again."""

import asyncio
import signal
from pathlib import Path

import pytest

from evermesh.launcher import Run, load_job
from evermesh.launcher.agent.spec import AgentSpec
from evermesh.launcher.controller.limit import stop_in_time
from evermesh.launcher.controller.telling import told_early_end
from evermesh.launcher.errors import AllocationMissing, JobFileInvalid
from evermesh.launcher.placement.choosing import placed
from evermesh.launcher.placement.slurm_allocation import Allocation, seconds
from evermesh.launcher.placement.slurm_step import step_command, step_variables
from evermesh.launcher.queueing import BatchRecord, started_again
from tests.launcher.jobs import launched
from tests.launcher.test_cli import evermesh

RECORD = BatchRecord(cluster="c", job="7", name="small", step=10)


@pytest.mark.parametrize(
    ("text", "left_s"),
    [
        ("1-02:03:04", 93784.0),
        ("2:03:04", 7384.0),
        ("3:04", 184.0),
        ("0:00", 0.0),
        ("UNLIMITED", None),
        ("INVALID", None),
    ],
)
def test_times_of_slurm_are_read(text: str, left_s: float | None) -> None:
    assert seconds(text) == left_s


def test_outside_of_an_allocation_the_way_into_one_is_told(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(AllocationMissing, match=r"SLURM_JOB_ID is not set.*sbatch"):
        placed(load_job(job_file, ["on=slurm"]))
    with pytest.raises(AllocationMissing):
        Allocation.current()


def test_auto_is_this_machine_unless_a_cluster_is_around(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    config = load_job(job_file, ["on=auto"])
    assert placed(config).on == "local"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert placed(config).on == "ray"
    with pytest.raises(JobFileInvalid, match="neither local, slurm, ray"):
        load_job(job_file, ["on=pbs"])


def test_the_command_line_of_a_step_holds_no_token_and_its_variables_no_options_of_other_steps() -> None:
    spec = AgentSpec(run=Path("/runs/small"), node="node-1", address="", slots=1, warm_module="m")
    command = step_command("7", "em1", "evermesh.small.node-1", spec, "10.0.0.1", "secret-token")
    assert "secret-token" not in " ".join(command)
    assert "--nodelist=em1" in command
    around = {
        "PATH": "/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "9",
        "SLURM_CPU_BIND": "x",
        "SRUN_CPUS_PER_TASK": "8",
        "EVERMESH_RACK": "of the batch host",
    }
    assert step_variables(around) == {"PATH": "/bin", "SLURM_JOB_ID": "7", "SLURM_EXIT_ERROR": "84"}


@pytest.mark.parametrize(
    "said", ["em1 does not see the run\nsrun: error: em1: task 0: Exited with exit code 2\n", "\n"]
)
def test_the_last_words_of_an_agent_are_its_own(said: str, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "agent-node-1.log").write_text(said)
    words = said.split("\n")[0] or "without a word"
    assert told_early_end(Run(tmp_path), "node-1").startswith(f"node-1 ended before it joined: {words} Its log: ")


class Limited:
    """A place whose limit is asked for, and the controller that is stopped."""

    def __init__(self, *left_s: float | None) -> None:
        self._left_s = list(left_s)
        self.stopped: list[tuple[int, float | None]] = []

    def time_left_s(self) -> float | None:
        return self._left_s.pop(0)

    def stop(self, number: int, *, at_once: bool, grace_s: float | None) -> None:
        assert not at_once
        self.stopped.append((number, grace_s))


@pytest.mark.parametrize(
    ("left_s", "stopped"),
    [
        ((None,), []),
        ((30.0,), [(signal.SIGTERM, 20.0)]),
        ((15.0,), [(signal.SIGTERM, 5.0)]),
        ((30.02, None), []),  # the limit was taken away meanwhile
        ((30.02, 29.9), [(signal.SIGTERM, pytest.approx(19.9))]),
    ],
)
def test_a_job_stops_as_long_before_its_limit_as_it_may_need_to_save(
    left_s: tuple[float | None, ...], stopped: list[tuple[int, float]]
) -> None:
    limited = Limited(*left_s)
    asyncio.run(stop_in_time(limited, limited, 20.0))
    assert limited.stopped == stopped


def test_starts_without_a_newer_checkpoint_are_counted() -> None:
    again = started_again(RECORD, 10)
    assert (again.step, again.idle_starts) == (10, 1)
    assert started_again(again, 10).idle_starts == 2
    assert started_again(again, 11) == RECORD.model_copy(update={"step": 11})


def test_the_same_command_goes_on_until_nothing_is_left(job_file: Path) -> None:
    command = ("launch", job_file, "--resume", "--set", "train.steps=100000", "--set", "train.checkpoint.every=null")
    with launched(job_file, "train.steps=100000", "train.checkpoint.every=null") as job:
        job.wait(lambda: len(job.run.telemetry.read_text().splitlines()) > 2 if job.run.telemetry.is_file() else False)
        job.process.send_signal(signal.SIGTERM)
        code, _, stderr = job.end()
        assert code == 143, stderr
    steps = len(job.losses)
    job.run.write_config(load_job(job.run.directory / "job.yaml", [f"train.stop_at={steps + 2}"]))
    for expected in ("resuming small", "nothing is left to do of run small"):
        again = evermesh(*command)
        assert again.returncode == 0, again.stderr
        assert expected in again.stdout
        assert len(job.losses) == steps + 2
