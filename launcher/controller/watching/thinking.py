"""What is concluded of one generation, window by window; imports the detectors, so nobody but the watcher imports it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from evermesh.fault.detectors import Context, diagnose
from evermesh.fault.detectors.kinds import SLOWNESS
from evermesh.fault.detectors.links import LinkWatch
from evermesh.fault.detectors.message_delays import NodeDelay
from evermesh.fault.detectors.streaming import JobWatch
from evermesh.fault.events import Finding
from evermesh.launcher.controller.watching.conclusions import key_of
from evermesh.launcher.controller.watching.expected import Expected
from evermesh.launcher.controller.watching.freed_memory import give_back
from evermesh.launcher.controller.watching.rings import RingReading
from evermesh.launcher.controller.watching.ways import Ways
from evermesh.launcher.controller.watching.windows import Moment, Windows
from evermesh.launcher.controller.watching.work import Work
from evermesh.launcher.watching.messages import Connections, PlannedWork, ReadRings, RingPart, Window
from evermesh.parallelism.planner.compiling import COMPILED, is_cached


class Thinking:
    """Of one generation of ``num_ranks`` ranks. ``ask`` sends an order to all agents."""

    def __init__(self, generation: int, num_ranks: int, num_nodes: int, ask: Callable[[ReadRings], None]) -> None:
        self.generation = generation
        self.expected = Expected(num_ranks)
        self.delays: tuple[NodeDelay, ...] = ()
        """Of messages between nodes, by the newest that were sampled."""
        self._windows, self._ways = Windows(num_ranks, num_nodes), Ways(num_nodes)
        self._rings = RingReading(generation, ask)
        self._job, self._work, self._links = JobWatch(), Work(num_ranks), LinkWatch()
        self._context = Context()
        self._of_rings: tuple[Finding, ...] = ()

    def tell(self, node: str, message: Window | RingPart | PlannedWork | Connections) -> None:
        """Take what an agent says.

        Raises:
            ValueError: it does not fit to the job.
        """
        match message:
            case Window():
                self._windows.take(node, message)
            case RingPart():
                self._rings.take(self._windows.trace(node, message))
            case Connections():
                self._ways.take(node, message)
            case PlannedWork():
                self.expected.take(message)

    def think(self, last_step_s: float) -> Sequence[Finding] | None:
        """What is to be said now; None: there is nothing new. ``last_step_s``: what agents see of the last step; 0 before the
        first one."""
        now_s = time.monotonic()
        traces = self._rings.complete(now_s)
        if traces and (not COMPILED or is_cached("kernels")):
            found = diagnose(traces, self._context).findings
            self._of_rings = tuple(one for one in found if one.kind not in SLOWNESS)
            return self._of_rings
        moment = self._windows.moment()
        if moment is None or any(process is not None and process.is_held for process in moment.processes.values()):
            return None  # a debugger may hold a rank as long as it likes
        self._context = Context(
            step_s=self.expected.step_s() or last_step_s or None,
            processes=moment.processes,
            starved=moment.starved,
            planned_s=self.expected.makespans_s(),
            cut_links=self._links.cut,
            skew_s=moment.apart_s,
        )
        said = self._join(moment)
        give_back()
        return said

    def _join(self, moment: Moment) -> list[Finding]:
        known, summaries = moment.processes.keys(), moment.summaries()
        self._work.note(summaries)
        ways = self._ways.seen()
        if ways is not None:
            self._links.look(ways)
        work_s = self._work.explained_s(self.expected.plans)
        self._job.context = replace(self._context, work_s=work_s, cut_links=self._links.cut)
        seen = self._job.join(summaries)
        self.delays = seen.delays
        if not seen.suspicious:
            self._of_rings = ()
        self._rings.suspect(seen.suspicious, time.monotonic())
        found = (*seen.findings, *self._links.find_slow([one.tail for one in summaries]))
        return _together([one for one in found if one.rank is None or one.rank in known], self._of_rings)


def _together(joined: list[Finding], of_rings: tuple[Finding, ...]) -> list[Finding]:
    """What windows and whole rings say; what names nobody is left out where the rings name somebody."""
    is_explained = any(one.rank is not None for one in of_rings)
    rings = {key_of(one): one for one in of_rings}
    kept = [one for one in joined if not is_explained or one.rank is not None or one.kind in SLOWNESS]
    return [*kept, *(one for key, one in rings.items() if key not in {key_of(other) for other in kept})]
