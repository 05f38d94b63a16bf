"""The file of targets follows the job, is never half written, and says at the end whether somebody should look."""

import asyncio
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evermesh.launcher import Run
from evermesh.launcher.config import ApiConfig
from evermesh.launcher.contact import write_contact
from evermesh.launcher.controller.targets import TargetsFile, targets_of

LABELS = {"__metrics_path__": "/api/metrics", "run": "llm", "role": "controller"}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "llm").mkdir()
    write_contact(tmp_path / "llm", "http://10.0.0.7:8470")
    return Run(tmp_path / "llm")


def controller(run: Run, state: str = "training", *agents: tuple[str, str | None, str]) -> Any:
    """What is asked of one: its run, its state, and its nodes by name, address of their numbers, and state."""
    nodes = [SimpleNamespace(name=name, host="gpu-17", metrics=at, state=now) for name, at, now in agents]
    return SimpleNamespace(run=run, state=state, nodes=nodes)


def test_lost_nodes_and_those_that_serve_nothing_are_left_out(run: Run) -> None:
    agents = (("node-0", "10.0.0.8:1", "ready"), ("node-1", "10.0.0.9:2", "lost"), ("node-2", None, "ready"))
    of_controller, of_agent = targets_of(controller(run, "training", *agents))
    assert of_controller == {"targets": ["10.0.0.7:8470"], "labels": LABELS}
    assert of_agent["targets"] == ["10.0.0.8:1"]
    assert of_agent["labels"] | {"role": "agent", "node": "node-0", "host": "gpu-17"} == of_agent["labels"]
    assert of_agent["labels"]["__metrics_path__"] == "/metrics"


def test_the_file_follows_what_changes(run: Run, tmp_path: Path) -> None:
    found = controller(run)
    targets = TargetsFile(run, ApiConfig(targets=tmp_path / "all"))

    async def follow() -> None:
        following = asyncio.create_task(targets.follow(found))
        while not (tmp_path / "all" / "llm.json").is_file():
            await asyncio.sleep(0.01)
        write_contact(run.directory, "http://10.0.0.9:4321")  # another controller, elsewhere
        while "10.0.0.9:4321" not in (tmp_path / "all" / "llm.json").read_text():
            await asyncio.sleep(0.01)
        following.cancel()

    asyncio.run(asyncio.wait_for(follow(), 30))
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["llm.json"]


@pytest.mark.parametrize(("state", "left"), [("finished", 0), ("stopped", 0), ("failed", 1)])
def test_of_a_job_that_failed_the_controller_stays(run: Run, state: str, left: int) -> None:
    targets = TargetsFile(run, ApiConfig())
    targets.end(controller(run, state, ("node-0", "10.0.0.8:1", "ready")))
    told = json.loads((run.directory / "prometheus.json").read_text())
    assert [target["labels"]["role"] for target in told] == ["controller"] * left


def test_a_run_that_was_removed_stays_removed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    targets = TargetsFile(run, ApiConfig())
    shutil.rmtree(run.directory)
    targets.end(controller(run, "failed"))
    assert not run.directory.exists()
    assert "targets for Prometheus are not written" in capsys.readouterr().out
