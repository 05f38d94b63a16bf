"""Watches the ranks of a job while they train: what agents tell of their records becomes findings that are told once.

The thinking is done by a process beside the controller, whose loop only passes on what agents say; see ``watcher``.
"""

import time
from collections import deque
from typing import TYPE_CHECKING

from evermesh.fault.events import Finding
from evermesh.launcher.controller.status import DelayStatus
from evermesh.launcher.controller.watching.conclusions import Change, Conclusions
from evermesh.launcher.controller.watching.lines import Begin, LastStep, Problem, Said, Step
from evermesh.launcher.controller.watching.watcher_process import WatcherProcess
from evermesh.launcher.watching.messages import Connections, PlannedWork, ReadRings, RingPart, Window
from evermesh.runtime.telemetry import StepReport

if TYPE_CHECKING:
    from evermesh.launcher.controller.job import Job

_WATCHED = frozenset(("starting", "training", "regrouping", "stopping"))
_AGAIN_S = 10.0
"""Between two watchers that end by themselves."""
_RAW = tuple(f'{{"kind":"{kind}",' for kind in ("window", "ring", "connections"))


def is_for_watcher(text: str) -> bool:
    """Whether an agent says something that the controller itself need not understand."""
    return text.startswith(_RAW)


class Watch:
    """Of one job. Whoever acts on findings looks at ``findings`` again and again."""

    def __init__(self, job: "Job") -> None:
        self._job = job
        self.findings: tuple[Finding, ...] = ()
        """Those that hold now, the surest first."""
        self.delays: tuple[DelayStatus, ...] = ()
        """Of messages between nodes, as far as samples of records tell; empty while nobody is watched."""
        self._watcher: WatcherProcess | None = None
        """None: no agent has told anything yet."""
        self._began_s = float("-inf")
        self._generation: int | None = None
        """That is watched; None: no agent has told anything of the one that lives."""
        self._last_step_s = 0.0
        self._conclusions = Conclusions()
        self._begun: deque[Finding] = deque()
        """Findings of which nobody was told that they are concluded."""
        self._over: deque[tuple[Finding, float]] = deque()
        """Likewise that they are over, with seconds since they began."""

    def take(self, node: str, message: Window | RingPart | PlannedWork | Connections) -> None:
        """Likewise, where it was read already."""
        self.pass_on(node, message.model_dump_json())

    def pass_on(self, node: str, text: str) -> None:
        """An agent tells something of the ranks of its node."""
        watcher = self._begun_watcher() if self._is_watched else None
        if watcher is not None:
            watcher.pass_on(node, text)

    def note_step(self, report: StepReport) -> None:
        """A step was reported."""
        if self._watcher is not None and self._generation is not None:
            self._watcher.say(Step(step=report.step, step_s=report.step_s))

    def look(self) -> None:
        """Do what is to be done now; called several times per second.

        Raises:
            OSError: a finding could not be written down; it is told the next time.
        """
        if not self._is_watched:
            self._end()
            return
        if self._watcher is not None:
            self._hear(self._watcher)
        self._tell()

    def close(self) -> None:
        """The job is over."""
        if self._watcher is not None:
            self._watcher.end()
            self._watcher = None

    @property
    def _is_watched(self) -> bool:
        life = self._job.life
        if life is None or self._job.state not in _WATCHED or life.done or life.failures or life.is_ending or life.lost:
            return False
        return self._generation is None or self._generation == self._job.generation

    def _begun_watcher(self) -> WatcherProcess | None:
        """Of the generation that lives; None: one has just ended by itself."""
        life, now_s = self._job.life, time.monotonic()
        if self._watcher is None:
            if now_s - self._began_s < _AGAIN_S:
                return None
            self._watcher, self._began_s, self._generation = WatcherProcess(), now_s, None
        if self._generation is None and life is not None:
            self._generation, self._last_step_s = self._job.generation, 0.0
            self._watcher.say(Begin(generation=self._generation, num_ranks=life.world_size, num_nodes=len(life.nodes)))
        return self._watcher

    def _hear(self, watcher: WatcherProcess) -> None:
        life = self._job.life
        step_s = life.step_s if life is not None else 0.0
        if step_s != self._last_step_s and self._generation is not None:
            self._last_step_s = step_s
            watcher.say(LastStep(step_s=step_s))
        for line in watcher.heard():
            match line:
                case Said() if line.generation == self._generation:
                    self._take(line)
                case ReadRings() if line.generation == self._generation:
                    self._job.tell(line)
                case Problem():
                    print(line.text, flush=True)
        if not watcher.is_alive:
            print("the watcher has ended by itself: nothing is concluded until there is another", flush=True)
            watcher.end()
            self._watcher = None

    def _take(self, said: Said) -> None:
        self.delays = said.delays
        self._change(self._conclusions.take(said.findings, time.monotonic()))

    def _change(self, change: Change) -> None:
        self._begun.extend(change.begun)
        self._over.extend(change.over)

    def _tell(self) -> None:
        """Write down what has begun and what is over."""
        scribe = self._job.scribe
        try:
            while self._begun:
                finding = self._begun[0]
                scribe.tell("finding", finding.text, step=finding.step, finding=finding.model_dump(mode="json"))
                self._begun.popleft()
            while self._over:
                finding, lasted_s = self._over[0]
                text = f"no longer, after {lasted_s:.1f} s: {finding.text}"
                scribe.tell("finding over", text, lasted_s=round(lasted_s, 3), finding=finding.model_dump(mode="json"))
                self._over.popleft()
        finally:
            self.findings = self._conclusions.findings

    def _end(self) -> None:
        """The generation is over, or about to be."""
        if self._generation is None:
            return
        self._change(self._conclusions.end(time.monotonic()))
        self._tell()
        self._generation, self.delays = None, ()
