"""Nodes that are processes of this machine, each an agent in a session of its own."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

import psutil
from pydantic import ValidationError

from evermesh.fault.process_state import ProcessState
from evermesh.launcher.agent.spec import AgentSpec
from evermesh.launcher.config import JobConfig
from evermesh.launcher.placement.specs import spec_of
from evermesh.launcher.processes import AGENT_MODULE, start_agent
from evermesh.launcher.run_directory import Run

_HEAD = "node-0"
"""Nodes of one machine count as machines: the controller is lost with this one, and another node takes over."""
_END_WAIT_S = 5.0
_LOOK_S = 0.02


class LocalPlacement:
    """Agents as processes; the nodes are called node-0, node-1, ..."""

    address = "127.0.0.1"

    def __init__(self, run: Run, config: JobConfig) -> None:
        self._run, self._config = run, config
        self._pids: dict[str, int] = {}
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, nodes: Sequence[str]) -> None:
        """Start an agent for each node, unless one runs: the controller that started it was killed before it joined."""
        running = self._running()
        for node in nodes:
            if node in running:
                self._pids[node] = running[node]
            else:
                self._children[node] = start_agent(self._spec(node))
                self._pids[node] = self._children[node].pid

    def adopt(self, pids: dict[str, int]) -> None:
        """Take over agents of an earlier controller."""
        self._pids |= pids

    def is_alive(self, node: str) -> bool | None:
        """Whether the agent of ``node`` runs; None while it is stopped."""
        child = self._children.get(node)
        if child is None and node not in self._pids:
            return None
        runs = child.poll() is None if child is not None else _runs(self._pids[node])
        state = ProcessState.of(self._pids[node]) if runs else None
        return None if state is not None and state.is_stopped else runs

    def replace(self, node: str) -> bool:
        """Start another agent for ``node``: the machine is still there."""
        self._kill(node)
        self.start([node])
        return True

    def shortage(self) -> str:
        """Nothing: this machine has as many agents as are wanted."""
        return ""

    def time_left_s(self) -> float | None:
        """None: nobody takes the nodes away."""
        return None

    def end(self, joining: Sequence[str] = ()) -> None:
        """End every agent that is left, those that are only about to join at once."""
        for node in joining:
            self._kill(node)
        until = time.monotonic() + _END_WAIT_S
        while any(map(self.is_alive, self._pids)) and time.monotonic() < until:
            time.sleep(_LOOK_S)
        for node in self._pids:
            self._kill(node)

    def _kill(self, node: str) -> None:
        if self.is_alive(node) is not False and node in self._pids:
            with suppress(ProcessLookupError):
                os.kill(self._pids[node], signal.SIGKILL)
        if node in self._children:
            self._children.pop(node).wait()

    def _running(self) -> dict[str, int]:
        """Agents of this run on this machine by node, whoever started them; those of another launch are ended."""
        found = {}
        for process in psutil.process_iter(["cmdline"]):
            spec = _spec_in(process.info["cmdline"] or [])
            if spec is None or spec.run != self._run.directory.absolute():
                continue
            if spec == self._spec(spec.node):
                found[spec.node] = process.pid
            else:
                process.kill()
        return found

    def _spec(self, node: str) -> AgentSpec:
        return spec_of(self._run, self._config, node, self.address, revives=True, is_head=node == _HEAD)


def _spec_in(command: Sequence[str]) -> AgentSpec | None:
    """What the agent with this command line was told; None if it is none."""
    if list(command[1:3]) != ["-m", AGENT_MODULE]:
        return None
    with suppress(ValidationError, IndexError):  # of another version
        return AgentSpec.model_validate_json(command[3])
    return None


def _runs(pid: int) -> bool:
    """Whether an agent runs as this process, which is not our child; its number may be somebody else's by now."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as command:
            return AGENT_MODULE.encode() in command.read()  # empty for a zombie
    except OSError:
        return False
