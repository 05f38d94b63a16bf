"""A worker is killed: how long until the others train again, next to the same trainer under torchrun.

Both train the demo's model with the same trainer, data and checkpoints, in one job each, and lose a worker again and
again. torchrun runs with ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``, without which its restarts mostly hang over gloo.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil

from evermesh.fault.events import read_events
from evermesh.launcher import Client, Run
from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.journal import read_journal
from evermesh.launcher.demo import quickstart
from evermesh.launcher.job_file import load_job, write_job
from evermesh.runtime.data import open_sources
from tests.benchmarks.harness import Row, paired_row

ROUNDS = 7
GOALS = {2: 0.5, 4: 1.0}
_WAIT_S = 60.0

PEER_SCRIPT = """
import json, os, sys
from pathlib import Path
from torch.distributed import TCPStore
from evermesh import checkpoint
from evermesh.runtime import TrainConfig, process_group
from evermesh.runtime.trainer import Trainer

config, folder = TrainConfig.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
(folder / f"pid-{rank}").write_text(str(os.getpid()))
store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, is_master=rank == 0)
process_group.start(config.device, rank, world, store, config.timeout_s)
Trainer(config, directory=folder, resume=checkpoint.latest(folder / "checkpoints") is not None).fit()
"""


class Kill(NamedTuple):
    """A worker that was killed."""

    at_s: float
    """By the wall clock."""
    took_s: tuple[float, float, float]
    """Until training went on, without loading; of loading; to the end of a step."""


def run() -> list[Row]:
    """Recovery of 2 and of 4 ranks, and of the controller."""
    return [*(row for workers in GOALS for row in _rows(workers)), _controller_row()]


def _rows(workers: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        config = _config(Path(name), workers)
        with _ours(config) as (directory, pid):
            killed = [_recover(directory, pid) for _ in range(ROUNDS)]
            decided = list(_decided_s(directory, [kill.at_s for kill in killed]))
        with _theirs(config, Path(name)) as (directory, pid):
            theirs = [_recover(directory, pid).took_s for _ in range(ROUNDS)]
    what = f"SIGKILL of 1 of {workers} ranks"
    ours = [kill.took_s for kill in killed]
    rows = [
        paired_row(
            f"{what} {until}",
            [recovery[index] for recovery in ours],
            "s",
            peer="torchrun",
            peer_values=[recovery[index] for recovery in theirs],
        )
        for index, until in enumerate(("to the next step, without loading", "loading", "to the end of the next step"))
    ]
    first, median, third = statistics.quantiles(decided, n=4)
    known = Row(f"{what} to the decision to recover", median, "s", third - first, goal=0.1)
    return [known, replace(rows[0], goal=GOALS[workers]), *rows[1:]]


def _controller_row() -> Row:
    """SIGKILL of the controller until another one answers; torchrun's job ends when its rendezvous host dies."""
    with tempfile.TemporaryDirectory() as name, _ours(_config(Path(name), 2)) as (directory, _):
        taken_over = [_replace_controller(Run(directory)) for _ in range(ROUNDS)]
    first, median, third = statistics.quantiles(taken_over, n=4)
    return Row("SIGKILL of the controller to the answer of another", median, "s", third - first, goal=2.0)


def _replace_controller(run: Run) -> float:
    _wait_steps(run.directory, 3)
    first = Client(run).status().pid
    os.kill(first, signal.SIGKILL)
    killed_s = time.monotonic()
    while Client(run).status().pid == first:
        time.sleep(0.01)
    seconds = time.monotonic() - killed_s
    assert run.state().attempt == 1, "training was interrupted"
    return seconds


def _config(folder: Path, workers: int) -> JobConfig:
    """The demo's model on short batches; a checkpoint after every step, so that no step is trained twice."""
    overrides = [
        f"runs={folder / 'runs'}",
        f"workers={workers}",
        "restarts=1000",
        "train.steps=100000",
        "train.stop_at=null",
        "train.data.context=1024",
        "train.data.batch_tokens=4096",
        "train.checkpoint.every=1",
    ]
    config = load_job(quickstart(), overrides)
    open_sources(config.train.data)  # prepared before anybody is measured
    return config


@contextmanager
def _ours(config: JobConfig) -> Iterator[tuple[Path, Callable[[], int]]]:
    job = config.runs.parent / "job.yaml"
    write_job(config, job)
    command = [str(Path(sys.executable).with_name("evermesh")), "launch", str(job)]
    run = Run(config.runs / config.name)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield run.directory, lambda: next(rank.pid or 0 for rank in Client(run).status().ranks if rank.rank == 1)
        finally:
            process.send_signal(signal.SIGTERM)


@contextmanager
def _theirs(config: JobConfig, folder: Path) -> Iterator[tuple[Path, Callable[[], int]]]:
    (folder / "peer.py").write_text(PEER_SCRIPT)
    (folder / "peer.json").write_text(json.dumps(config.train.model_dump(mode="json")))
    (folder / "peer").mkdir()
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--max-restarts", "1000"]
    command += [
        "--nproc-per-node",
        str(config.workers),
        *(str(folder / name) for name in ("peer.py", "peer.json", "peer")),
    ]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            yield folder / "peer", lambda: int((folder / "peer" / "pid-1").read_text())
        finally:
            family = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for member in family:
                if member.is_running():
                    member.kill()


def _recover(directory: Path, pid: Callable[[], int]) -> Kill:
    """Kill rank 1 in training."""
    _wait_steps(directory, 3)  # it is warm again
    known, victim = len(_resumed(directory)), pid()
    killed_s = time.time()
    os.kill(victim, signal.SIGKILL)
    until = time.monotonic() + _WAIT_S
    while len(_resumed(directory)) == known:
        assert time.monotonic() < until, f"no recovery in {_WAIT_S} s"
        time.sleep(0.01)
    _wait_steps(directory, 1)
    stepped_s = (directory / "telemetry.jsonl").stat().st_mtime
    at_s, load_s = _resumed(directory)[known]
    return Kill(killed_s, (at_s - killed_s - load_s, load_s, stepped_s - killed_s))


def _decided_s(directory: Path, killed_s: list[float]) -> Iterator[float]:
    """From each kill until the controller had decided what follows, by its journal."""
    entries = [one for one in read_journal(Run(directory).journal) if one.fields.get("to") == "recovering"]
    for at_s in killed_s:
        yield next(one.time_s for one in entries if one.time_s >= at_s) - at_s


def _resumed(directory: Path) -> list[tuple[float, float]]:
    """When the trainer was ready to train again, wall clock, and how long it had loaded."""
    events = directory / "events.jsonl"
    found = list(read_events(events)) if events.is_file() else []
    return [(event.time_s, float(str(event.fields["load_s"]))) for event in found if event.kind == "resumed"]


def _wait_steps(directory: Path, steps: int) -> None:
    """Return after some more steps."""
    telemetry, until = directory / "telemetry.jsonl", time.monotonic() + _WAIT_S
    count = lambda: telemetry.read_bytes().count(b"\n") if telemetry.is_file() else 0  # noqa: E731
    wanted = count() + steps
    while count() < wanted:
        assert time.monotonic() < until, f"not {steps} steps in {_WAIT_S} s"
        time.sleep(0.01)
