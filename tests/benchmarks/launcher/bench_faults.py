"""Ranks that freeze, and nodes that are lost together with their memory: how long until the job has trained on.

Small jobs with the settings that a user gets; from the fault to the end of the next step. A stopped rank (SIGSTOP) and one
that holds the interpreter are found from outside; a lost node's state comes out of the memory of the others, no checkpoint
is ever written. The peer's figures for the same faults are in fault-launcher measurements that cannot be repeated in
minutes: torchrun finds no frozen rank before its time limit, and takes 16 s with a spare, 43 s without.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evermesh.launcher.chaos.report import FaultReport
from evermesh.launcher.demo import quickstart
from evermesh.launcher.job_file import load_job, write_job
from evermesh.runtime.data import open_sources
from tests.benchmarks.harness import Row
from tests.launcher.jobs import with_faults
from tests.launcher.test_flush import _nobody_comes_back
from tests.launcher.test_lost_nodes import _members, _told, _wait_protected, job_of, lose

ROUNDS = int(os.environ.get("ROUNDS", "10"))
_APART = 15
"""Steps between two faults of one job."""


def run() -> list[Row]:
    """Frozen ranks of one job; lost nodes, each of a job of its own."""
    with tempfile.TemporaryDirectory() as name:
        job_file = short_job(Path(name), "workers=2")
        stopped = _frozen(job_file, {"kind": "stop", "target": "rank 1"})
        held = _frozen(job_file, {"kind": "hang", "target": "rank 1", "holds_gil": True})
    rows = []
    for what, reports in (("rank stopped (SIGSTOP)", stopped), ("rank that holds the interpreter", held)):
        found_s = [one.found_after_s for one in reports if one.found_after_s is not None]
        again_s = [one.training_after_s for one in reports if one.training_after_s is not None]
        rows.append(_row(f"{what} to the finding in the event log, {len(found_s)} of {len(reports)}", found_s, 1.0))
        rows.append(_row(f"{what} to the end of the next step, default settings", again_s, 5.0))
    for spares, goal in ((1, 4.0), (0, 6.0)):
        took_s, lost = zip(*(_lose_a_node(spares) for _ in range(ROUNDS)), strict=True)
        what = "with a spare" if spares else "shrink 4 -> 3"
        rows.append(_row(f"node lost with its memory, {what}, to the end of the next step", took_s, goal))
        rows.append(Row(f"the same: protected steps lost, sum of {ROUNDS}", sum(lost), "steps", goal=0))
    return rows


def _row(what: str, values: Sequence[float], goal: float) -> Row:
    first, median, third = statistics.quantiles(values, n=4)
    return Row(f"{what}; longest {max(values):.2f} s", median, "s", third - first, goal=goal)


def short_job(folder: Path, *overrides: str) -> Path:
    """A job file of the demo's model on short batches."""
    short = ("train.data.context=1024", "train.data.batch_tokens=4096", "train.stop_at=null")
    config = load_job(quickstart(), [f"runs={folder / 'runs'}", *short, *overrides])
    open_sources(config.train.data)  # prepared before anybody is measured
    write_job(config, folder / "job.yaml")
    return folder / "job.yaml"


def _frozen(job_file: Path, fault: dict[str, Any]) -> Sequence[FaultReport]:
    """What became of each of a row of faults."""
    faults = [{**fault, "at": {"step": _APART * (number + 1)}} for number in range(ROUNDS)]
    report = with_faults(job_file, f"train.steps={_APART * (ROUNDS + 1)}", "restarts=1000", faults=faults)
    assert report.passed, report.problems
    return report.faults


def _lose_a_node(spares: int) -> tuple[float, int]:
    """Seconds from the loss of a machine to the end of the next step, and how many protected steps it cost."""
    nodes = 3 if spares else 4
    shape = (f"workers={nodes}", f"nodes={nodes}", f"spares={spares}", f"min_nodes={nodes - (not spares)}")
    without_storage = ("train.checkpoint.every=null", *(() if spares else ("shrink_after_s=0.5",)))
    with tempfile.TemporaryDirectory() as name:
        job_file = short_job(Path(name), shape[0])
        with job_of(job_file, *shape, *without_storage) as job:
            victim = _members(job)[1]
            protected = _wait_protected(job, _members(job), 3)
            lost_s = time.time()
            lose(job, victim)
            if spares:
                job.wait_training(2)
            else:
                with _nobody_comes_back(job, f"node-{victim}"):
                    job.wait_training(2)
            took_s = job.run.telemetry.stat().st_mtime - lost_s
            job.wait(lambda: bool(_told(job, "resumed")))
            (resumed,) = _told(job, "resumed")
            assert resumed.fields["source"] == "memory"
            return took_s, max(0, protected - (resumed.step or 0))
