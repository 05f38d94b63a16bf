"""Nodes of a Slurm allocation: one job step of one task on each, which runs the agent.

Steps outlive the controller that asked for them. What may wait for Slurm happens in a thread: the controller never does.
"""

import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from evermesh.launcher.agent.spec import AgentSpec
from evermesh.launcher.config import JobConfig
from evermesh.launcher.errors import SlurmSilent
from evermesh.launcher.placement.slurm_allocation import Allocation
from evermesh.launcher.placement.slurm_step import SRUN_FAILED, step_command, step_variables
from evermesh.launcher.placement.specs import spec_of
from evermesh.launcher.run_directory import Run

_AGAIN_S = 10.0
"""How often it is tried to start a step on a node where Slurm refuses it: the node is down, and may come back."""
_END_WAIT_S = 5.0
_GONE_WAIT_S = 5.0
_LOOK_S = 0.05


class SlurmPlacement:
    """Agents as job steps; node-N is the N-th node of the allocation, those beyond ``nodes`` are spares."""

    def __init__(self, run: Run, config: JobConfig, token: str) -> None:
        self._run, self._config, self._token = run, config, token
        self._allocation = Allocation.current()
        self.address = self._allocation.address
        self._steps: dict[str, subprocess.Popen[bytes]] = {}
        """The srun of each node, while it is ours."""
        self._refused_s: dict[str, float] = {}
        """When Slurm refused to start a step for a node."""
        self._ends_s: float | None = None
        self._slurm = ThreadPoolExecutor(1, thread_name_prefix="slurm")

    def adopt(self, pids: dict[str, int]) -> None:
        """Leave the steps of an earlier controller alone; without ``pids`` they are of an earlier launch, and are ended."""
        if not pids:
            for step in self._left():
                self._end_step(step)

    def start(self, nodes: Sequence[str]) -> None:
        """Start a step for each of these that the allocation has a node for."""
        for node in nodes:
            if self._host(node) is not None:
                self._steps[node] = self._srun(node)

    def is_alive(self, node: str) -> bool | None:
        """False when the step has ended; while it lasts its node may be gone all the same: Slurm takes minutes to notice."""
        step = self._steps.get(node)
        code = None if step is None else step.poll()
        if code == SRUN_FAILED:  # no agent was started: the node is down, perhaps not for good
            del self._steps[node]
            self._refused_s[node] = time.monotonic()
        if time.monotonic() - self._refused_s.get(node, float("inf")) > _AGAIN_S:
            del self._refused_s[node]
            self.start([node])
        return None if code in (None, SRUN_FAILED) else False

    def replace(self, node: str) -> bool:
        """End what is left of the step of ``node``, and start another in its place."""
        if self._host(node) is None:
            return False
        self._refused_s.pop(node, None)
        before = self._steps.pop(node, None)
        self._slurm.submit(self._replace, node, before)
        return True

    def shortage(self) -> str:
        """Which nodes the allocation lacks, and which Slurm does not let us use."""
        hosts, wanted = self._allocation.hosts, self._config.nodes
        told = []
        if len(hosts) < wanted:
            told.append(f"The allocation has {len(hosts)} nodes, and the job wants {wanted}.")
        if self._refused_s:
            names = ", ".join(f"{self._host(node)} ({node})" for node in sorted(self._refused_s))
            told.append(f"Slurm starts nothing on {names}: see {self._run.logs}/agent-*.log.")
        return " ".join(told)

    def time_left_s(self) -> float | None:
        """Seconds until the time limit of the allocation, as far as it is known; None: there is none."""
        with suppress(SlurmSilent):
            left_s = self._allocation.time_left_s()
            self._ends_s = None if left_s is None else time.monotonic() + left_s
        return None if self._ends_s is None else self._ends_s - time.monotonic()

    def end(self, joining: Sequence[str] = ()) -> None:
        """Wait for the agents to leave, and end the steps that are left."""
        for node in joining:
            if node in self._steps:
                self._steps[node].terminate()  # which srun passes on
        self._slurm.shutdown(cancel_futures=True)
        self._wait(_END_WAIT_S)
        for step in self._left():
            self._end_step(step)
        self._wait(_GONE_WAIT_S)
        for child in self._steps.values():
            child.kill()
            child.wait()

    def _wait(self, wait_s: float) -> None:
        until = time.monotonic() + wait_s
        while any(step.poll() is None for step in self._steps.values()) and time.monotonic() < until:
            time.sleep(_LOOK_S)

    def _host(self, node: str) -> str | None:
        number = int(node.rpartition("-")[2])
        return self._allocation.hosts[number] if number < len(self._allocation.hosts) else None

    def _left(self, node: str = "") -> list[str]:
        """Steps of this run, or of one node of it."""
        wanted = self._name(node) if node else None
        try:
            found = self._allocation.steps()
        except SlurmSilent as error:
            print(f"the steps of job {self._allocation.job} are not known: {error}", flush=True)
            return []
        mine = self._name("")
        return [
            step
            for name, steps in found.items()
            for step in steps
            if name == wanted or (not node and name.startswith(mine))
        ]

    def _end_step(self, step: str) -> None:
        try:
            self._allocation.end_step(step)
        except SlurmSilent as error:
            print(f"step {step} is left: {error}", flush=True)

    def _replace(self, node: str, before: "subprocess.Popen[bytes] | None") -> None:
        """In a thread of its own."""
        for step in self._left(node):
            self._end_step(step)
        if before is not None:
            before.kill()  # it may wait for a node that is gone
            before.wait()
        self._steps[node] = self._srun(node)

    def _name(self, node: str) -> str:
        return f"evermesh.{self._run.name}.{node}"

    def _srun(self, node: str) -> "subprocess.Popen[bytes]":
        """Start the step of ``node``. Nothing secret is told: the agent reads the token where the run is."""
        host = self._host(node)
        assert host is not None
        spec = self._spec(node, host)
        log = spec.run / "logs" / f"agent-{node}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return subprocess.Popen(
                step_command(self._allocation.job, host, self._name(node), spec, self.address, self._token),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=step_variables(os.environ),
                start_new_session=True,  # it outlives this controller
            )

    def _spec(self, node: str, host: str) -> AgentSpec:
        is_beside = host == self._allocation.here
        return spec_of(self._run, self._config, node, revives=is_beside, is_head=is_beside)
