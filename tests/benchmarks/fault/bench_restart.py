"""A worker of a job with 64 MiB of state per rank is killed: how long until the next step, from memory and from storage."""

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from evermesh.fault.events import Event, read_events
from evermesh.launcher import Client, Run
from evermesh.launcher.config import JobConfig
from evermesh.launcher.demo import quickstart
from evermesh.launcher.job_file import load_job
from evermesh.runtime.data import open_sources
from tests.benchmarks.harness import Row, paired_row
from tests.benchmarks.launcher.bench_recovery import _ours

ROUNDS = 11
GOALS = {2: 0.5, 4: 1.0}
_WAIT_S = 100.0
_FIGURES = ("until it trains again", "loading, part of that", "to the end of the next step", "steps trained again")
_FROM_MEMORY = ("train.checkpoint.every=null", "train.snapshot.every=1")
_FROM_STORAGE = ("train.checkpoint.every=1", "train.snapshot=off")


def run() -> list[Row]:
    """Of 2 and of 4 ranks."""
    rows: list[Row] = []
    for workers, goal in GOALS.items():
        memory, storage = _measure(workers, _FROM_MEMORY), _measure(workers, _FROM_STORAGE)
        for index, what in enumerate(_FIGURES):
            ours, theirs = ([one[index] for one in found] for found in (memory, storage))
            name = f"SIGKILL of 1 of {workers} ranks of 64 MiB: {what}"
            if index < 3:
                row = paired_row(name, ours, "s", peer="from a local checkpoint", peer_values=theirs)
                rows.append(replace(row, goal=goal) if index == 0 else row)
            else:
                peer_value = statistics.mean(theirs)
                rows.append(
                    Row(name, statistics.mean(ours), "steps", peer="from a local checkpoint", peer_value=peer_value)
                )
    return rows


def _measure(workers: int, how: tuple[str, ...]) -> list[tuple[float, ...]]:
    with tempfile.TemporaryDirectory() as name, _running(Path(name), workers, how) as (directory, client):
        return [_recover(directory, client, len(found)) for found in _rounds(directory)]


def _rounds(directory: Path) -> Iterator[list[Event]]:
    for _ in range(ROUNDS):
        _await_steps(directory, 3)  # it is warm again
        yield _events(directory, "resumed")


@contextmanager
def _running(folder: Path, workers: int, how: tuple[str, ...]) -> Iterator[tuple[Path, Client]]:
    with _ours(_config(folder, workers, how)) as (directory, _):
        yield directory, Client(Run(directory))


def _config(folder: Path, workers: int, how: tuple[str, ...]) -> JobConfig:
    """5.5 million parameters per rank, with moments 64 MiB in float32; few tokens, so that steps are short."""
    overrides = [
        f"runs={folder / 'runs'}",
        f"workers={workers}",
        "restarts=1000",
        "train.steps=100000",
        "train.stop_at=null",
        "train.data.context=64",
        "train.data.batch_tokens=128",
        "train.model.hidden=384",
        "train.model.heads=6",
        "train.model.kv_heads=2",
        "train.model.ffn=1024",
        f"train.model.layers={6 if workers == 2 else 13}",
        *how,
    ]
    config = load_job(quickstart(), overrides)
    open_sources(config.train.data)  # prepared before anybody is measured
    return config


def _recover(directory: Path, client: Client, known: int) -> tuple[float, ...]:
    """Kill rank 1 in training; seconds until the next step begins, of loading, and to the end of that step; steps lost."""
    victim = next(rank.pid or 0 for rank in client.status().ranks if rank.rank == 1)
    killed_s = time.time()
    os.kill(victim, signal.SIGKILL)
    _await(lambda: len(_events(directory, "resumed")) > known)
    _await_steps(directory, 1)
    stepped_s = (directory / "telemetry.jsonl").stat().st_mtime
    resumed = _events(directory, "resumed")[known]
    load_s = float(str(resumed.fields["load_s"]))
    lost = float(str(_events(directory, "restarted")[-1].fields["lost_steps"]))
    return resumed.time_s - killed_s, load_s, stepped_s - killed_s, lost


def _events(directory: Path, kind: str) -> list[Event]:
    file = directory / "events.jsonl"
    return [event for event in read_events(file) if event.kind == kind] if file.is_file() else []


def _await_steps(directory: Path, steps: int) -> None:
    telemetry = directory / "telemetry.jsonl"
    count = lambda: telemetry.read_bytes().count(b"\n") if telemetry.is_file() else 0  # noqa: E731
    wanted = count() + steps
    _await(lambda: count() >= wanted)


def _await(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + _WAIT_S
    while not holds():
        assert time.monotonic() < until, f"not in {_WAIT_S} s"
        time.sleep(0.005)
