"""Starting the two long-lived processes of a job, each in a session of its own: no terminal takes them with it."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evermesh.launcher.agent.spec import AgentSpec
    from evermesh.launcher.run_directory import Run
    from evermesh.launcher.succession.office import Mandate

AGENT_MODULE = "evermesh.launcher.agent"

_APART = ("/bin/sh", "-c", '"$@" &', "sh")
"""Starts what follows as nobody's child."""


def start_controller(run: "Run") -> subprocess.Popen[bytes]:
    """Start the controller of ``run``, which goes on where its journal ends."""
    return _start(_controller(run), run.logs / "controller.log")


def start_controller_apart(run: "Run") -> None:
    """Start the controller as nobody's child: Ray ends an actor together with its children."""
    _start([*_APART, *_controller(run)], run.logs / "controller.log").wait()


def start_elected_controller(run: "Run", mandate: "Mandate") -> None:
    """Start the controller that ``mandate`` tells of, as nobody's child."""
    _start([*_APART, *_controller(run), mandate.model_dump_json()], run.logs / "controller.log").wait()


def start_agent(spec: "AgentSpec") -> subprocess.Popen[bytes]:
    """Start an agent on this machine; it is told nothing secret."""
    command = [sys.executable, "-m", AGENT_MODULE, spec.model_dump_json()]
    return _start(command, spec.run / "logs" / f"agent-{spec.node}.log")


def start_tracker(run: "Run", number: int) -> None:
    """Start what tells that tracker of the job, as nobody's child: it may outlive the controller."""
    command = [sys.executable, "-m", "evermesh.launcher.tracking", str(run.directory.absolute()), str(number)]
    _start([*_APART, *command], run.logs / "trackers.log").wait()


def _controller(run: "Run") -> list[str]:
    return [sys.executable, "-m", "evermesh.launcher.controller", str(run.directory.absolute())]


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
