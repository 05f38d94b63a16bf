"""A real job with a restart, and what a controller would tell of it."""

import json
import math
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from evermesh.fault.events import read_events
from evermesh.launcher import Run
from evermesh.launcher.controller.status import JobStatus, NodeStatus, RankStatus
from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.simulator import Timeline
from evermesh.runtime.telemetry import StepReport, read_telemetry
from tests.launcher.test_cli import EVERMESH

STEPS = 60


def train(corpus: Path, folder: Path, *, steps: int) -> Run:
    """Train a job on 4 workers that saves every 10 steps and loses a worker after step 24."""
    values = {
        "name": "tiny",
        "runs": str(folder / "runs"),
        "workers": 4,
        "train": {
            "steps": steps,
            "model": {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 32},
            "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 512, "batch_tokens": 3072},
            "layout": {"capacity": 256},
            "checkpoint": {"every": 10},
            "snapshot": "off",  # so that steps are lost
            "timeout_s": 60,
        },
    }
    job = folder / "job.yaml"
    job.write_text(yaml.safe_dump(values))
    run = Run(folder / "runs" / "tiny")
    with subprocess.Popen([*EVERMESH, "launch", str(job)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        _kill_a_worker(process, run)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return run


def _kill_a_worker(process: subprocess.Popen[bytes], run: Run) -> None:
    while not run.telemetry.is_file() or len(read_telemetry(run.telemetry)) < 24:
        assert process.poll() is None
        time.sleep(0.005)
    next(process for process in psutil.process_iter() if _is_worker(process, 1, run)).kill()


def _is_worker(process: psutil.Process, rank: int, run: Run) -> bool:
    """Whether it is the process that writes the log of ``rank``, wherever it stands in the tree of processes."""
    try:
        files = [Path(opened.path) for opened in process.open_files()]
        return any(file.name == f"rank-{rank}.log" and run.directory in file.parents for file in files)
    except psutil.Error:  # ended meanwhile, or not ours
        return False


@dataclass
class Recorded:
    """What the answers are made of; a test may change it while the page looks."""

    status: JobStatus
    steps: list[dict[str, Any]]
    events: list[dict[str, Any]]
    plan: BatchPlan | None = None
    timeline: Timeline | None = None
    plan_step: int = 0
    asked: list[str] = field(default_factory=list)
    is_over: bool = False
    """Streams end."""

    def say(self, kind: str, text: str, step: int | None = None) -> None:
        """Add an event."""
        event = {"time_s": time.time(), "kind": kind, "step": step, "phase": None, "text": text, "fields": {}}
        self.events.append(event | {"seq": len(self.events) + 1})


def recorded(run: Path, plan: BatchPlan, timeline: Timeline) -> Recorded:
    """What a finished run left in its directory, as the controller would tell it near the end of the training."""
    lines = (run / "telemetry.jsonl").read_text().splitlines()
    steps = [_finite(json.loads(line)) | {"seq": seq} for seq, line in enumerate(lines, start=1)]
    events = [json.loads(event.model_dump_json()) for event in read_events(run / "events.jsonl")]
    numbered = [event | {"seq": seq} for seq, event in enumerate(events, start=1)]
    status = status_after(StepReport.from_json(lines[-1]), run, restarts=sum(e["kind"] == "restarted" for e in events))
    return Recorded(status, steps, numbered, plan, timeline, plan_step=status.step or 0)


def status_after(report: StepReport, run: Path, *, restarts: int) -> JobStatus:
    """A job that has just finished the step of ``report``, on nodes of two ranks; the last rank is slow."""
    workers = report.workers
    slow = workers - 1
    ranks = tuple(
        RankStatus(
            rank=rank, node=f"node-{rank // 2}", pid=4000 + rank, state="training", step=report.step,
            step_s=report.step_s, compute_s=report.step_s * (0.9 if rank == slow else 0.4 + 0.002 * (rank % 7)),
        )
        for rank in range(workers)
    )  # fmt: skip
    nodes = tuple(
        NodeStatus(
            node=f"node-{number}", host="trainer.example", address="127.0.0.1", pid=3000 + number, state="ready",
            lease_left_s=4.2, ranks=tuple(range(2 * number, min(2 * number + 2, workers))),
            memory_free_bytes=13 << 30, shared_memory_bytes=64 << 20,
        )
        for number in range((workers + 1) // 2)
    )  # fmt: skip
    return JobStatus(
        name=run.name, directory=str(run), state="training", reason="all ranks train", generation=restarts + 1,
        restarts=restarts, max_restarts=3, workers=workers, nodes=nodes, ranks=ranks, step=report.step,
        steps=report.steps, loss=report.loss, tokens_per_s=report.tokens_per_s, time_left_s=83.0,
        started_s=time.time() - 600, pid=2999,
    )  # fmt: skip


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
