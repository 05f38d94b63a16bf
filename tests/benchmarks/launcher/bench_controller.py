"""1,000 agents with a connection each and two beats a second, against one controller on one core.

The agents are played by another process on the other core, over loopback; the controller is a real one, with its journal,
its API and its clock. What ranks would compute, and the windows of their records, are not played.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evermesh.fault.events import read_events
from evermesh.launcher import Client, Run
from evermesh.launcher.demo import quickstart
from evermesh.launcher.job_file import load_job
from evermesh.launcher.run_directory import RunState
from tests.benchmarks.harness import Row, exact_row

NODES = 1000
SECONDS = 60.0
_START_S, _END_S = 120.0, 120.0
_QUIET = ("journal_copies=0", "preflight=off", "health_every_s=null", "train.snapshot=null", "metrics=false")


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
    ]


def play(folder: Path, nodes: int, seconds: float) -> dict[str, Any]:
    """Have agents play a job; what the controller measured, and what was seen from outside."""
    overrides = [f"runs={folder}", f"workers={nodes}", f"nodes={nodes}", "train.stop_at=null", "train.steps=1000000"]
    made = Run.create(load_job(quickstart(), [*overrides, *_QUIET]))
    made.write_state(RunState(state="running", workers=nodes))
    result, began_s = folder / "result.json", time.monotonic()
    module = "tests.benchmarks.launcher"
    command = [sys.executable, "-m", f"{module}.loaded_controller", str(made.directory), str(result)]
    with (
        (made.logs / "controller.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as controller,
    ):
        _wait(lambda: (made.directory / "controller.json").is_file() and made.is_alive(), _START_S)
        arguments = [str(made.directory), str(nodes), str(seconds)]
        with subprocess.Popen([sys.executable, "-m", f"{module}.played_agents", *arguments]) as agents:
            started_s, longest_s = _watch(made, began_s, agents)
            agents.wait(_END_S)
        controller.wait(_END_S)
    events = read_events(made.events) if made.events.is_file() else ()
    lost = sum(event.kind == "node lost" for event in events)
    found: dict[str, Any] = json.loads(result.read_text())
    return found | {"lost": lost, "longest_status_s": longest_s, "started_s": started_s}


def _watch(made: Run, began_s: float, agents: "subprocess.Popen[bytes]") -> tuple[float, float]:
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
