"""1,000 agents with a connection each and two beats a second, against one controller on one core; then 12,288 ranks.

The agents are played by another process on the other core, over loopback; the controller is a real one, with its journal,
its API and its clock. What ranks would compute is not played. Of the second job the ranks record, the agents tell of it as
those of so many ranks do, and the dashboard is open: what counts there is the memory of the controller.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import httpx2

from evermesh.fault.events import read_events
from evermesh.launcher import Client, Run
from evermesh.launcher.contact import read_contact, read_token
from evermesh.launcher.demo import quickstart
from evermesh.launcher.job_file import load_job
from evermesh.launcher.run_directory import RunState
from tests.benchmarks.harness import Row, exact_row

NODES = 1000
SECONDS = 60.0
AGENTS, RANKS, LARGE_SECONDS = int(os.environ.get("EVERMESH_AGENTS", "1536")), 12_288, 120.0
SLOWER = float(os.environ.get("EVERMESH_SLOWER", "1" if (os.cpu_count() or 1) > 2 else "4"))
"""How much more rarely the agents of the second job talk, for one core does not play so many."""
_START_S, _END_S = 120.0, 120.0
_QUIET = (
    *("journal_copies=0", "preflight=off", "health_every_s=null", "train.snapshot=null", "metrics=false"),
    "join_timeout_s=600",
)


def run() -> list[Row]:
    """Play a job of ``NODES`` nodes for ``SECONDS``."""
    with tempfile.TemporaryDirectory() as folder:
        job = play(Path(folder), NODES, SECONDS)
    handled_s = sorted(job["handled_s"])
    cuts = statistics.quantiles(handled_s, n=1000)
    return [
        exact_row(
            f"a beat handled, p99 of {len(handled_s):,} ({NODES} agents, 2 per second)", cuts[989], "s", goal=0.25
        ),
        exact_row("the same, median", cuts[499], "s"),
        exact_row("the same, longest", handled_s[-1], "s"),
        exact_row("nodes declared dead", job["lost"], "nodes", goal=0),
        exact_row("answer of the status, longest of one a second", job["longest_status_s"], "s"),
        exact_row("processor of the controller", 100 * job["processor_s"] / job["trained_s"], "% of a core"),
        exact_row("memory of the controller", job["memory_bytes"] / 2**20, "MiB"),
        exact_row("from the launch until all ranks beat", job["started_s"], "s"),
        *_large(),
    ]


def _large() -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        job = play(Path(folder), AGENTS, LARGE_SECONDS, ranks_per_node=RANKS // AGENTS, slower=SLOWER)
    what = f"{AGENTS:,} agents, {RANKS:,} ranks with records, dashboard open"
    return [
        exact_row(f"memory of the controller, {what}", job["peak_bytes"] / 1e6, "MB", goal=500),
        exact_row(f"memory of its watcher, {what}", job["watcher_bytes"] / 1e6, "MB", goal=500),
        exact_row(f"a beat handled, p99, {what}", statistics.quantiles(job["handled_s"], n=1000)[989], "s"),
        exact_row(f"windows joined, {what}", job["joined"], "windows"),
        exact_row(f"nodes declared dead, {what}", job["lost"], "nodes", goal=0),
        exact_row(f"lines of the dashboard, {what}", job["lines"], "lines"),
    ]


def play(
    folder: Path, nodes: int, seconds: float, *, ranks_per_node: int = 1, slower: float | None = None
) -> dict[str, Any]:
    """Have agents play a job; what the controller measured, and what was seen from outside. With ``slower`` ranks record."""
    workers = nodes * ranks_per_node
    overrides = [f"runs={folder}", f"workers={workers}", f"nodes={nodes}", "train.stop_at=null", "train.steps=1000000"]
    made = Run.create(load_job(quickstart(), [*overrides, *_QUIET]))
    made.write_state(RunState(state="running", workers=workers))
    result, began_s = folder / "result.json", time.monotonic()
    module = "tests.benchmarks.launcher"
    command = [
        sys.executable,
        "-m",
        f"{module}.loaded_controller",
        str(made.directory),
        str(result),
        str(slower or 1.0),
    ]
    with (
        (made.logs / "controller.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as controller,
    ):
        _wait(lambda: (made.directory / "controller.json").is_file() and made.is_alive(), _START_S)
        arguments = [str(made.directory), str(nodes), str(seconds), *([] if slower is None else [str(slower)])]
        command = [sys.executable, "-m", f"{module}.played_agents", *arguments]
        with Viewer(made) as viewer, subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agents:
            started_s, longest_s = _watch(made, began_s, agents)
            told = agents.communicate(timeout=_END_S)[0]
            if agents.returncode:
                controller.kill()
                raise RuntimeError(f"agents lost the controller, which is too much for this machine: {nodes} agents")
        controller.wait(_END_S)
    events = read_events(made.events) if made.events.is_file() else ()
    lost = sum(event.kind == "node lost" for event in events)
    found: dict[str, Any] = json.loads(result.read_text())
    seen = {"longest_status_s": longest_s, "started_s": started_s, "told_s": float(told), "lines": viewer.lines}
    return found | {"lost": lost} | seen


class Viewer:
    """Has the dashboard open, as one browser."""

    def __init__(self, made: Run) -> None:
        self.lines = 0
        self._thread = threading.Thread(target=self._read, args=(made,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(_END_S)

    def _read(self, made: Run) -> None:
        headers = {"Authorization": f"Bearer {read_token(made.directory)}"}
        url = f"{read_contact(made.directory)}/api/watch"
        with (
            suppress(httpx2.HTTPError),
            httpx2.stream("GET", url, headers=headers, timeout=60.0, trust_env=False) as answer,
        ):
            for _ in answer.iter_lines():
                self.lines += 1


def _watch(made: Run, began_s: float, agents: "subprocess.Popen[str]") -> tuple[float, float]:
    """Ask for the status once a second while the agents live: seconds until all ranks had finished a step, and the longest
    answer from then on."""
    client, longest_s = Client(made, 60.0), 0.0
    started_s: float | None = None
    while agents.poll() is None and made.state().state == "running":
        asked_s = time.monotonic()
        status = client.status()
        took_s = time.monotonic() - asked_s
        if status.state == "training":
            if started_s is None:
                started_s = time.monotonic() - began_s
            longest_s = max(longest_s, took_s)
        time.sleep(max(0.0, 1.0 - took_s))
    assert started_s is not None, "it never trained"
    return started_s, longest_s


def _wait(holds: Callable[[], bool], timeout_s: float) -> None:
    until_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until_s, f"not in {timeout_s} s"
        time.sleep(0.05)
