"""Before a job ends that cannot go on: what is newer in memory than in storage is written there.

what keepers hold (``reach.py``) ──► guests for what was lost with nodes (``guests.py``) ──► a process writes a checkpoint
"""

import subprocess
import sys
from pathlib import Path

from pydantic import ValidationError

from evermesh.fault.snapshot.choosing import Version
from evermesh.launcher.controller.guests import Guests
from evermesh.launcher.controller.job import Job
from evermesh.launcher.controller.nodes import Node
from evermesh.launcher.controller.reach import Reach
from evermesh.launcher.controller.work import newest_step
from evermesh.launcher.flushing import Flushed, Order
from evermesh.launcher.messages import KeeperTells

_MODULE = "evermesh.launcher.flushing"


class Rescue:
    """Writes the newest snapshot of ``job`` as a checkpoint, by a process of its own; once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._reach: Reach | None = None
        """Of the memory of all nodes, where something is to be rebuilt that may be there."""
        self._guests: Guests | None = None
        self._process: subprocess.Popen[str] | None = None
        self._is_over = False
        self.why_not = ""
        """Why nothing was written though something newer was in memory, for people."""

    @property
    def is_rebuilding(self) -> bool:
        """Whether what agents tell of their keepers is about this."""
        return self._guests is not None and self._guests.is_under_way

    def greet(self, node: Node) -> None:
        """A node is there, perhaps again."""
        if self._guests is not None:
            self._guests.greet(node)

    def hear(self, node: Node, told: KeeperTells) -> None:
        """An agent tells of its keeper, or of one that it hosts."""
        if self._guests is not None:
            self._guests.hear(node, told)

    def is_under_way(self) -> bool:
        """Called until it says no: nothing is in memory, or it has been written, or cannot be."""
        if self._is_over:
            return False
        if self._process is None and not self._is_prepared():
            return True
        if self._process is None and not self._begin():
            return self._end(Flushed())
        assert self._process is not None
        if self._process.poll() is None:
            return True
        return self._end(self._flushed(self._process))

    def give_up(self) -> None:
        """Somebody cannot wait: nothing of it becomes visible."""
        if self._guests is not None:
            self._guests.give_up()
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._is_over = True

    def _is_prepared(self) -> bool:
        """Whether guests have what was lost with nodes, or cannot have it, or it is there without."""
        job = self._job
        if self._guests is None:
            if self._reach is None and job.nodes.keepers and self._guests_beyond(None).step is not None:
                self._reach = Reach(job.nodes.keepers, job.launch, job.keeper_secret)
            if self._reach is not None and not self._reach.is_known:
                return False
            self._guests = self._guests_beyond(self._reach.newest if self._reach is not None else None)
            self._guests.begin()
        self._guests.look()
        return not self._guests.is_under_way

    def _guests_beyond(self, reached: Version | None) -> Guests:
        """Those, if any, without which nothing is whole that is newer than what was reached, and than storage."""
        job, saved = self._job, self._saved
        hosts = [name for name, state in job.nodes.states().items() if state == "ready"]

        def is_worth(version: Version) -> bool:
            return version.step > saved and (reached is None or version > reached)

        return Guests(job, hosts, f"guest-{job.scribe.generation}-end", is_worth)

    def _begin(self) -> bool:
        job = self._job
        keepers = tuple((keeper.host, keeper.port) for keeper in job.nodes.keepers)
        is_silent = any(node.state not in ("ready", "refused") and node.keeper is not None for node in job.nodes)
        if not keepers or (self._newer_step() is None and not is_silent):
            return False
        order = Order(keepers=keepers, launch=job.launch, secret=job.keeper_secret.hex(), newer_than=self._saved)
        log = Path(job.run.logs) / "flush.log"
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE, str(job.run.directory.absolute())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self._process.stdin is not None
        self._process.stdin.write(order.model_dump_json())
        self._process.stdin.close()
        return True

    @property
    def _saved(self) -> int:
        """Step of the newest checkpoint; -1: there is none."""
        newest = newest_step(self._job.run)
        return -1 if newest is None else newest

    def _newer_step(self) -> int | None:
        """The newest after that of which any node has told that it holds a part; one that is gone cannot tell."""
        saved, launch = self._saved, self._job.launch
        told = [node.in_memory for node in self._job.nodes if node.in_memory is not None]
        steps = [part.step for one in told if one.launch == launch for part in one.parts]
        return max((step for step in steps if step > saved), default=None)

    def _flushed(self, process: "subprocess.Popen[str]") -> Flushed:
        output = process.stdout.read() if process.stdout else ""
        try:
            return Flushed.model_validate_json(output)
        except ValidationError:
            text = f"the process ended with {process.returncode}. Its log: {self._job.run.logs / 'flush.log'}"
            return Flushed(problems=(text,))

    def _end(self, found: Flushed) -> bool:
        """Tell what became of it; it is not under way any more."""
        self._is_over, scribe = True, self._job.scribe
        if found.step is not None:
            text = f"the snapshot of step {found.step} was written to storage in {found.seconds:.1f} s"
            scribe.tell("flushed", text, step=found.step, seconds=found.seconds, bytes_received=found.bytes_received)
            return False
        lost, newer = self._guests.why_not if self._guests is not None else "", self._newer_step()
        reasons = [lost, *found.problems]
        if newer is not None or any(reasons):
            what = f"Step {newer} was in memory, but" if newer is not None else "What was in memory"
            why = "; ".join(filter(None, reasons)) or "not all of its parts are left, and no stripe makes up for them"
            self.why_not = f"{what} could not be written to storage: {why}."
            scribe.tell("flush failed", self.why_not)
        return False
