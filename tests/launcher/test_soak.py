"""Many restarts in a row: a random worker is killed as soon as the job has trained on, and none of them hangs.

``make soak`` does 200 of them; the other tests of the launcher include a slice of 8.
"""

import itertools
import json
import os
import random
import statistics
import time
from pathlib import Path

import pytest

from evermesh.launcher.controller.journal import Entry
from evermesh.launcher.controller.work import newest_step
from evermesh.launcher.lines import Lines
from evermesh.runtime.telemetry import StepReport
from tests.launcher.jobs import Job, launched
from tests.launcher.test_cli import evermesh

ENDLESS = ("train.steps=1000000", "restarts=1000", "train.checkpoint.every=1", "train.checkpoint.keep=2")
LONGEST_S = 60.0
"""From a kill to the next step; more is a hang."""


class Restarts:
    """Kills workers, and measures how long it takes until the job trains on."""

    def __init__(self, job: Job) -> None:
        self._job, self._random = job, random.Random(0)
        self._steps, self._journal = Lines(job.run.telemetry), Lines(job.run.journal, from_start=True)

    def kill_one(self, generation: int) -> float:
        """Kill a worker of this generation; seconds until the next one has finished a step."""
        self._job.kill_rank(self._random.randrange(2))
        killed_s = time.monotonic()
        while not self._has_begun(generation + 1):
            self._wait(killed_s)
        list(self._steps.new())  # what the killed attempt still wrote
        while not list(self._steps.new()):
            self._wait(killed_s)
        return time.monotonic() - killed_s

    def _has_begun(self, generation: int) -> bool:
        new = [Entry.model_validate_json(line) for line in self._journal.new()]
        return any(entry.kind == "attempt" and entry.generation == generation for entry in new)

    def _wait(self, since_s: float) -> None:
        assert time.monotonic() - since_s < LONGEST_S, self._job.journal[-4:]
        time.sleep(0.005)


def survive(job_file: Path, restarts: int) -> list[float]:
    """A job after that many kills has trained on and can be stopped; seconds of every restart."""
    with launched(job_file, *ENDLESS, name="soak") as job:
        job.wait_training()
        job.wait_checkpoint()
        killer = Restarts(job)
        took_s = []
        for generation in range(1, restarts + 1):
            saved = newest_step(job.run) or 0
            took_s.append(killer.kill_one(generation))
            job.wait(lambda saved=saved: (newest_step(job.run) or 0) > saved)  # type: ignore[misc]
        job.wait_training(restarts + 1)
        status = job.client.status()
        assert (status.generation, status.restarts, status.state) == (restarts + 1, restarts, "training")
        assert len(status.nodes) == 1
        assert evermesh("stop", job.run.directory).returncode == 0
        steps = [StepReport.from_json(line).step for line in job.run.telemetry.read_bytes().splitlines()]
        assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(steps))  # none was skipped
        return took_s


def tell(took_s: list[float]) -> None:
    told = {
        "restarts": len(took_s),
        "median_s": round(statistics.median(took_s), 3),
        "max_s": round(max(took_s), 3),
        "load": round(os.getloadavg()[0], 1),
    }
    print(f"\nfrom the kill of a worker to the next step: {json.dumps(told)}")


def test_8_restarts_in_a_row(job_file: Path) -> None:
    tell(survive(job_file, 8))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_200_restarts_in_a_row(job_file: Path) -> None:
    tell(survive(job_file, 200))
