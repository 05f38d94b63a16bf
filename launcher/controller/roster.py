"""The nodes of a job: agents are started for them, judged, replaced, and sent away at the end."""

import asyncio
import time
from collections.abc import Mapping, Sequence

from evermesh.launcher.controller.leases import LEASE_S
from evermesh.launcher.controller.life import Life
from evermesh.launcher.controller.machine import NodeState
from evermesh.launcher.controller.nodes import Node, Nodes
from evermesh.launcher.controller.scribe import Scribe
from evermesh.launcher.controller.status import JobState
from evermesh.launcher.controller.telling import told_early_end
from evermesh.launcher.errors import NotReplicated
from evermesh.launcher.messages import Leave
from evermesh.launcher.placement import Placement
from evermesh.launcher.run_directory import Run

_LEAVE_WAIT_S = 3.0


class Roster:
    """Keeps the nodes of ``run``; the names are those of the nodes that it may have, spares included."""

    def __init__(self, run: Run, names: Sequence[str], placement: Placement, scribe: Scribe) -> None:
        self._run, self._names, self._placement, self._scribe = run, names, placement, scribe
        self._found_by_s = time.monotonic() + LEASE_S
        self.nodes = Nodes()
        self.refusal: str | None = None
        """Why no attempt can be started at all."""

    def find(self, pids: Mapping[str, int], grace_s: float = 0.0) -> None:
        """Take over the agents of an earlier controller, by node, and start one for every other node.

        Those may need ``grace_s`` longer than a lease until they are heard: they may still try to reach the one before.
        """
        self._found_by_s += grace_s
        for name in self._names:
            self.nodes.expect(name)
        self._placement.adopt(dict(pids))
        for name, pid in pids.items():
            node = self.nodes[name]
            node.state, node.pid = "cut off", pid
            node.heard_s = node.proof_s = node.heard_s + grace_s
        self._placement.start([name for name in self._names if name not in pids])

    def is_finding_out(self) -> bool:
        """Whether agents of an earlier controller may still be about to say hello."""
        missing = [node for node in self.nodes if node.state == "cut off" and node.host == ""]
        return bool(missing) and time.monotonic() < self._found_by_s

    def shortage(self) -> str:
        """What the place lacks to start more agents."""
        return self._placement.shortage()

    def judge(self, life: Life | None, state: JobState) -> None:
        """Note which nodes were lost or cut off by now; ``state`` is that of the job."""
        step_s = life.step_s if life and not life.failures else 0.0  # after a failure no steps are to be expected
        for node in self.nodes:
            found = self.nodes.judge(node, self._placement.is_alive(node.name), step_s)
            if found == node.state:
                continue
            if node.state == "joining":
                self._note_early_end(node.name, state)
                node.state = found
            else:
                self._note(node, found, life, state)

    def replace(self, name: str) -> None:
        """Have another agent started for a node that was lost, if its place can have one."""
        if self._placement.replace(name):
            self.nodes.expect(name)

    def restart_ended(self, error: OSError) -> None:
        """While too few agents answer: start those again whose processes are known to have ended, for they are missed."""
        if isinstance(error, NotReplicated):
            for node in self.nodes:
                if self._placement.is_alive(node.name) is False:
                    self._placement.replace(node.name)

    async def dismiss(self) -> None:
        """Send every agent away; returns when they are gone."""
        for node in self.nodes:
            node.send(Leave())
        until = time.monotonic() + _LEAVE_WAIT_S
        while any(node.outbox is not None for node in self.nodes) and time.monotonic() < until:
            await asyncio.sleep(0.02)
        joining = [node.name for node in self.nodes if node.state == "joining"]
        await asyncio.to_thread(self._placement.end, joining)

    def _note_early_end(self, name: str, state: JobState) -> None:
        """An agent ended before it joined: nothing can be done without it, or it is one that would replace another."""
        text = told_early_end(self._run, name)
        if state in ("placing", "waiting"):
            self.refusal = text
        else:
            self._scribe.tell("node lost", text, node=name)

    def _note(self, node: Node, found: NodeState, life: Life | None, state: JobState) -> None:
        node.state = found
        silent_s = time.monotonic() - node.heard_s
        takes_part = life is not None and node.name in life.nodes
        if found == "lost":
            has_ended = self._placement.is_alive(node.name) is False
            why = "its agent ended" if has_ended else f"not heard for {silent_s:.1f} s"
            if life and takes_part:
                life.lost.add(node.name)
            if not takes_part or state not in ("starting", "training", "regrouping", "stopping"):
                self.replace(node.name)
            self._scribe.tell("node lost", f"{node.name} was lost: {why}", node=node.name)  # last: it may fail
        elif found == "cut off" and node.host:
            text = f"{node.name} was not heard for {silent_s:.1f} s, but training goes on"
            self._scribe.tell("node cut off", text, node=node.name)
