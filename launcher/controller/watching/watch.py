"""Watches the ranks of a job while they train: joins what agents tell of their records, and concludes findings.

Everything but the thinking happens in the loop of the controller; that happens in one thread beside it.
"""

import importlib
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType
from typing import TYPE_CHECKING

from evermesh.fault.events import Finding
from evermesh.launcher.watching.messages import Connections, PlannedWork, RingPart, Window
from evermesh.runtime.telemetry import StepReport

if TYPE_CHECKING:
    from evermesh.fault.detectors.message_delays import NodeDelay
    from evermesh.launcher.controller.job import Job
    from evermesh.launcher.controller.watching.thinking import Said, Thinking

Told = Window | RingPart | PlannedWork | Connections
_THINKING = "evermesh.launcher.controller.watching.thinking"
_MOST_EARLY = 4096
_WATCHED = frozenset(("starting", "training", "regrouping", "stopping"))


class Watch:
    """Of one job. Whoever acts on findings looks at ``findings`` again and again."""

    def __init__(self, job: "Job") -> None:
        self._job = job
        self.findings: tuple[Finding, ...] = ()
        """Those that hold now, the surest first."""
        self._thinking: Thinking | None = None
        """Of the generation that is watched; None: no agent has told anything of it."""
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="watch")
        self._under_way: Future[Said] | None = None
        self._loading: Future[ModuleType] | None = None
        """Of the detectors, which takes a moment that the loop does not have."""
        self._early: deque[tuple[str, Told]] = deque(maxlen=_MOST_EARLY)

    @property
    def delays(self) -> "tuple[NodeDelay, ...]":
        """Of messages between nodes, as far as samples of records tell; empty while nobody is watched."""
        return self._thinking.delays if self._thinking is not None else ()

    def take(self, node: str, message: Told) -> None:
        """An agent tells something of the generation that lives."""
        if not self._is_watched:
            return
        self._early.append((node, message))
        self._take_all()

    def _take_all(self) -> None:
        """Take what was told, as soon as the detectors are loaded."""
        thinking = self._begun() if self._early else None
        while thinking is not None and self._early:
            self._take(thinking, *self._early.popleft())

    def _take(self, thinking: "Thinking", node: str, message: Told) -> None:
        try:
            match message:
                case Window():
                    thinking.windows.take(node, message)
                case RingPart():
                    thinking.rings.take(thinking.windows.trace(node, message))
                case Connections():
                    thinking.ways.take(node, message)
                case PlannedWork():
                    thinking.expected.take(message)
        except ValueError as error:  # of an agent of another version: nobody is watched through it
            print(f"not understood of {node}: {error}", flush=True)

    def note_step(self, report: StepReport) -> None:
        """A step was reported."""
        if self._thinking is not None:
            self._thinking.expected.note(report.step, report.step_s)

    def look(self) -> None:
        """Do what is to be done now; called several times per second.

        Raises:
            OSError: a finding could not be written down; it is told the next time.
        """
        if not self._is_watched:
            self._end()
            return
        self._take_all()
        thinking, under_way = self._thinking, self._under_way
        if thinking is None or (under_way is not None and not under_way.done()):
            return
        if under_way is not None:
            self._under_way = None
            self._conclude(thinking, under_way)
        self._tell(thinking)
        life = self._job.life
        work = thinking.next_work(time.monotonic(), life.step_s if life is not None else 0.0)
        if work is not None:
            self._under_way = self._executor.submit(work)

    @property
    def _is_watched(self) -> bool:
        life = self._job.life
        if life is None or self._job.state not in _WATCHED or life.done or life.failures or life.is_ending or life.lost:
            return False
        return self._thinking is None or self._thinking.generation == self._job.generation

    def _begun(self) -> "Thinking | None":
        """Of the generation that lives; None: the detectors are being loaded."""
        life = self._job.life
        if self._thinking is None and life is not None:
            self._loading = self._loading or self._executor.submit(importlib.import_module, _THINKING)
            if self._loading.done():
                begin = self._loading.result().Thinking
                self._thinking = begin(self._job.generation, life.world_size, len(life.nodes), self._job.tell)
        return self._thinking

    def _conclude(self, thinking: "Thinking", done: "Future[Said]") -> None:
        try:
            thinking.take(done.result(), time.monotonic())
        except Exception as error:  # noqa: BLE001  the boundary: detectors that fail cost findings, not the job
            print(f"nothing is concluded of this window: {type(error).__name__}: {error}", flush=True)

    def _tell(self, thinking: "Thinking") -> None:
        """Write down what has begun and what is over."""
        scribe = self._job.scribe
        try:
            while thinking.begun:
                finding = thinking.begun[0]
                scribe.tell("finding", finding.text, step=finding.step, finding=finding.model_dump(mode="json"))
                thinking.begun.popleft()
            while thinking.over:
                finding, lasted_s = thinking.over[0]
                text = f"no longer, after {lasted_s:.1f} s: {finding.text}"
                scribe.tell("finding over", text, lasted_s=round(lasted_s, 3), finding=finding.model_dump(mode="json"))
                thinking.over.popleft()
        finally:
            self.findings = thinking.conclusions.findings

    def _end(self) -> None:
        """The generation is over, or about to be."""
        self._early.clear()
        thinking = self._thinking
        if thinking is None:
            return
        thinking.end(time.monotonic())
        self._tell(thinking)
        self._thinking = self._under_way = None
