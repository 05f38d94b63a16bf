"""Jobs in tests: started as a user starts them, looked into from outside, ended for certain."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

from evermesh import checkpoint
from evermesh.fault.events import read_events
from evermesh.fault.snapshot.keeper.area import area_of, sweep
from evermesh.launcher import Client, Run
from evermesh.launcher.chaos.report import ChaosReport
from evermesh.launcher.controller.journal import Entry, read_journal
from evermesh.launcher.controller.status import JobStatus
from evermesh.launcher.succession.replica import folder_of
from evermesh.runtime.telemetry import read_telemetry
from tests.fault.snapshot.keepers import kill_keeper
from tests.launcher.test_cli import EVERMESH

WAIT_S = 60.0


class Job:
    """A job and the ``evermesh launch`` that shows it."""

    def __init__(self, process: subprocess.Popen[str], run: Run) -> None:
        self.process, self.run = process, run
        self.client = Client(run)

    def wait(self, holds: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
        """Return as soon as ``holds``."""
        until = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < until, (
                f"not in {timeout_s} s; events: {self.events}, journal: {self.journal[-4:]}"
            )
            time.sleep(0.01)

    def wait_training(self, generation: int = 1) -> JobStatus:
        """Wait for the first step of an attempt."""
        self.wait(lambda: self.has_trained(generation))
        return self.client.status()

    def has_trained(self, generation: int = 1) -> bool:
        """Whether an attempt, this one or a later one, has finished a step."""
        return any(entry.fields.get("to") == "training" and entry.generation >= generation for entry in self.journal)

    def wait_checkpoint(self) -> None:
        """Wait for a checkpoint."""
        self.wait(lambda: checkpoint.latest(self.run.checkpoints) is not None)

    def end(self, timeout_s: float = WAIT_S) -> tuple[int, str, str]:
        """Exit code and output of ``evermesh launch`` at its end."""
        stdout, stderr = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, stdout, stderr

    def kill_rank(self, rank: int) -> float:
        """SIGKILL one worker; returns when, by the wall clock."""
        self.wait(lambda: rank in self.pids)  # a new controller has to be told by the agents
        pid = self.pids[rank]
        killed_s = time.time()
        os.kill(pid, signal.SIGKILL)
        return killed_s

    @property
    def pids(self) -> dict[int, int]:
        """Processes of the living ranks."""
        return {found.rank: found.pid for found in self.client.status().ranks if found.pid is not None}

    @property
    def journal(self) -> list[Entry]:
        return list(read_journal(self.run.journal))

    @property
    def events(self) -> list[str]:
        return [event.kind for event in read_events(self.run.events)] if self.run.events.is_file() else []

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in read_telemetry(self.run.telemetry)]

    @property
    def agents(self) -> dict[str, int]:
        """The latest agent of every node."""
        return {
            str(entry.fields["node"]): int(str(entry.fields["pid"])) for entry in self.journal if entry.kind == "node"
        }

    def processes(self) -> list[psutil.Process]:
        """Everything that belongs to the job, but not ``evermesh launch``."""
        found: list[psutil.Process] = []
        for pid in filter(None, [self.run.state().pid, *self.agents.values()]):
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                found += [process, *process.children(recursive=True)]
        return list(set(found))


@contextmanager
def launched(
    job_file: Path,
    *overrides: str,
    name: str = "small",
    command: Sequence[str] = ("launch",),
    within: Sequence[str] = (),
    **variables: str,
) -> Iterator[Job]:
    """``evermesh launch``, or another command that launches, in a process group of its own, as soon as its run exists.

    ``within`` is what it is run by, such as the command that enters a namespace. Nothing of it is left at the end.
    """
    given = [part for value in overrides for part in ("--set", value)]
    command = [*within, *EVERMESH, *command, str(job_file), "--name", name, *given]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "EVERMESH_CLUSTER": str(job_file.with_name("cluster")), **variables},
    ) as process:
        job = Job(process, Run(job_file.parent / "runs" / name))
        try:
            job.wait(lambda: (job.run.directory / "token").is_file() or process.poll() is not None)
            yield job
        finally:
            end_for_certain(job)


def with_faults(
    job_file: Path, *overrides: str, faults: Sequence[dict[str, Any]], compared: bool = False, **schedule: Any
) -> ChaosReport:
    """What ``evermesh chaos`` reports about this schedule; its exit code is that of the report."""
    path = job_file.with_name("faults.yaml")
    path.write_text(yaml.safe_dump({"faults": list(faults), **schedule}))
    return chaos(job_file, *overrides, options=("--schedule", str(path), *(("--compare",) if compared else ())))


def chaos(job_file: Path, *overrides: str, options: Sequence[str], timeout_s: float = 500.0) -> ChaosReport:
    """What ``evermesh chaos`` reports; its exit code is that of the report."""
    patient = ("join_timeout_s=600", *overrides)  # agents load torch, on a machine that does other things too
    with launched(job_file, *patient, command=("chaos", "--json", *options)) as job:
        code, stdout, stderr = job.end(timeout_s)
    assert stdout, stderr
    report = ChaosReport.model_validate_json(stdout)
    assert code == (0 if report.passed else 1)
    return report


def end_for_certain(job: Job) -> None:
    """End every process of ``job``, whatever state it is in; what would start them again first."""
    job.process.kill()
    with suppress(Exception):
        job.run.write_state(job.run.state().model_copy(update={"state": "failed"}))  # nobody revives it
    for process in job.processes():
        with suppress(psutil.NoSuchProcess):
            process.kill()
    with suppress(OSError):
        for node in job.agents:
            kill_keeper(area_of(job.run.directory, node))
            shutil.rmtree(folder_of(job.run.directory, node), ignore_errors=True)
        sweep()


def clean_losses(job_file: Path, steps: int, *overrides: str) -> list[float]:
    """Losses of a run that nothing happens to."""
    with launched(job_file, f"train.steps={steps}", *overrides, name="clean") as job:
        code, _, stderr = job.end()
        assert code == 0, stderr
        return job.losses
