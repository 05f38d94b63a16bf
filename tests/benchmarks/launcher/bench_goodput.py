"""Two ranks with steps of some 50 ms, of which one is killed every minute: the part of the time that went into steps that
count.

Snapshots in memory, as by default; nothing is written to storage before the end. What a step takes without faults is
measured in the same job.
"""

import os
import statistics
import tempfile
from pathlib import Path

from evermesh.runtime.telemetry import read_telemetry
from tests.benchmarks.harness import Row
from tests.benchmarks.launcher.bench_faults import short_job
from tests.launcher.jobs import launched, with_faults

KILLS = int(os.environ.get("KILLS", "4"))
_APART_S = 60.0
_SMALL = (
    "train.model.hidden=48",
    "train.model.layers=1",
    "train.data.context=512",
    "train.data.batch_tokens=1024",
)
_ABOUT = ("workers=2", "train.checkpoint.every=null", "restarts=1000")


def run() -> list[Row]:
    """Of ``KILLS`` minutes."""
    with tempfile.TemporaryDirectory() as name:
        job_file = short_job(Path(name), "workers=2", *_SMALL)
        step_s = _step_s(job_file)
        apart = round(_APART_S / step_s)
        faults = [
            {"kind": "kill", "target": "rank 1", "at": {"step": apart * number}} for number in range(1, KILLS + 1)
        ]
        report = with_faults(job_file, f"train.steps={apart * (KILLS + 1)}", *_ABOUT, faults=faults)
        assert report.passed, report.problems
    took_s = [found.training_after_s or 0.0 for found in report.faults]
    return [
        Row(f"step without faults, median; {KILLS} kills, one every {apart} steps", 1e3 * step_s, "ms"),
        Row("SIGKILL of 1 of 2 ranks to the end of the next step, median", statistics.median(took_s), "s"),
        Row("steps trained again, all", report.steps_lost, "steps"),
        Row(f"goodput over {report.wall_s:.0f} s", 100 * report.goodput, "%", goal=98.5),
    ]


def _step_s(job_file: Path) -> float:
    """Of a job that nothing happens to."""
    with launched(job_file, "train.steps=200", *_ABOUT, name="clean") as job:
        code, _, stderr = job.end()
        assert code == 0, stderr
        return statistics.median(step.step_s for step in read_telemetry(job.run.telemetry)[20:])
