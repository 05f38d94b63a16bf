"""Before a job ends that cannot go on: what is newer in memory than in storage is written there."""

import subprocess
import sys
from pathlib import Path

from pydantic import ValidationError

from evermesh.launcher.contact import keeper_secret, read_token
from evermesh.launcher.controller.nodes import Nodes
from evermesh.launcher.controller.scribe import Scribe
from evermesh.launcher.controller.work import launch_of, newest_step
from evermesh.launcher.flushing import Flushed, Order
from evermesh.launcher.run_directory import Run

_MODULE = "evermesh.launcher.flushing"


class Rescue:
    """Writes the newest snapshot of ``run`` as a checkpoint, by a process of its own; once."""

    def __init__(self, run: Run, nodes: Nodes, scribe: Scribe) -> None:
        self._run, self._nodes, self._scribe = run, nodes, scribe
        self._process: subprocess.Popen[str] | None = None
        self._is_over = False

    def is_under_way(self, since_s: float) -> bool:
        """Called until it says no: nothing is in memory, or it has been written, or cannot be. ``since_s`` is when the job
        was launched."""
        if self._is_over:
            return False
        if self._process is None and not self._begin(since_s):
            self._is_over = True
            return False
        assert self._process is not None
        if self._process.poll() is None:
            return True
        self._is_over = True
        self._tell(self._process.stdout.read() if self._process.stdout else "", self._process.returncode)
        return False

    def give_up(self) -> None:
        """Somebody cannot wait: nothing of it becomes visible."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._is_over = True

    def _begin(self, since_s: float) -> bool:
        keepers = tuple((keeper.host, keeper.port) for keeper in self._nodes.keepers)
        launch, newest = launch_of(since_s), newest_step(self._run)
        if not keepers or not self._may_be_newer(launch, -1 if newest is None else newest):
            return False
        order = Order(
            keepers=keepers,
            launch=launch,
            secret=keeper_secret(read_token(self._run.directory), launch).hex(),
            newer_than=-1 if newest is None else newest,
        )
        log = Path(self._run.logs) / "flush.log"
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, str(self._run.directory.absolute())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self._process.stdin is not None
        self._process.stdin.write(order.model_dump_json())
        self._process.stdin.close()
        return True

    def _may_be_newer(self, launch: str, newest: int) -> bool:
        """Whether memory may hold something newer: a node tells so, or is gone and cannot tell."""
        told = [node.in_memory for node in self._nodes if node.in_memory is not None]
        steps = [part.step for found in told if found.launch == launch for part in found.parts]
        is_silent = any(node.state != "ready" and node.keeper is not None for node in self._nodes)
        return is_silent or max(steps, default=-1) > newest

    def _tell(self, output: str, code: int) -> None:
        try:
            found = Flushed.model_validate_json(output)
        except ValidationError:
            text = f"the snapshots in memory could not be written to storage: the process ended with {code}."
            self._scribe.tell("flush failed", f"{text} Its log: {self._run.logs / 'flush.log'}")
            return
        if found.step is not None:
            text = f"the snapshot of step {found.step} was written to storage in {found.seconds:.1f} s"
            self._scribe.tell(
                "flushed", text, step=found.step, seconds=found.seconds, bytes_received=found.bytes_received
            )
        for problem in found.problems if found.step is None else ():
            self._scribe.tell("flush failed", f"what is in memory could not be written to storage: {problem}")
