"""What is concluded of one generation; imports the detectors, so nobody imports it before an agent tells something."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from evermesh.fault.detectors import Context, diagnose
from evermesh.fault.detectors.kinds import SLOWNESS
from evermesh.fault.detectors.links import LinkWatch
from evermesh.fault.detectors.message_delays import NodeDelay
from evermesh.fault.detectors.streaming import JobWatch
from evermesh.fault.events import Finding
from evermesh.fault.recorder.trace import RankTrace
from evermesh.launcher.controller.watching.conclusions import Change, Conclusions, key_of
from evermesh.launcher.controller.watching.expected import Expected, Planned
from evermesh.launcher.controller.watching.freed_memory import give_back
from evermesh.launcher.controller.watching.rings import RingReading
from evermesh.launcher.controller.watching.ways import Seen, Ways
from evermesh.launcher.controller.watching.windows import Moment, Windows
from evermesh.launcher.controller.watching.work import Work
from evermesh.launcher.watching.messages import ReadRings
from evermesh.parallelism.planner.compiling import COMPILED, is_cached


@dataclass(frozen=True, slots=True)
class Said:
    """What detectors said."""

    findings: tuple[Finding, ...]
    suspicious: tuple[int, ...] | None
    """Ranks whose rings are to be read; None: these were read."""
    delays: tuple[NodeDelay, ...] = ()


class Thinking:
    """Of one generation of ``num_ranks`` ranks."""

    def __init__(self, generation: int, num_ranks: int, num_nodes: int, ask: Callable[[ReadRings], None]) -> None:
        self.generation, self.num_ranks = generation, num_ranks
        self.windows, self.expected = Windows(num_ranks, num_nodes), Expected(num_ranks)
        self.rings, self.conclusions = RingReading(generation, ask), Conclusions()
        self.begun: deque[Finding] = deque()
        """Findings of which nobody was told that they are concluded."""
        self.over: deque[tuple[Finding, float]] = deque()
        """Likewise that they are over, with seconds since they began."""
        self.delays: tuple[NodeDelay, ...] = ()
        """Of messages between nodes, by the newest that were sampled."""
        self.ways = Ways(num_nodes)
        self._job, self._work, self._links = JobWatch(), Work(num_ranks), LinkWatch()
        self._known: frozenset[int] = frozenset()
        self._context = Context()
        self._of_rings: tuple[Finding, ...] = ()

    def next_work(self, now_s: float, last_step_s: float) -> Callable[[], Said] | None:
        """What is to be thought of now, by another thread; None: there is nothing new. ``last_step_s``: what agents see of
        the last step; 0 before the first one."""
        traces = self.rings.complete(now_s)
        if traces and (not COMPILED or is_cached("kernels")):
            return partial(_read, traces, self._context)
        moment = self.windows.moment()
        if moment is None or any(process is not None and process.is_held for process in moment.processes.values()):
            return None  # a debugger may hold a rank as long as it likes
        self._known = frozenset(moment.processes)
        self._context = Context(
            step_s=self.expected.step_s() or last_step_s or None,
            processes=moment.processes,
            starved=moment.starved,
            planned_s=self.expected.makespans_s(),
            cut_links=self._links.cut,
            skew_s=moment.apart_s,
        )
        return partial(self._join, moment, self._context, dict(self.expected.plans), self.ways.seen())

    def take(self, said: Said, now_s: float) -> None:
        """Take what has been thought."""
        if said.suspicious is None:
            self._of_rings = tuple(one for one in said.findings if one.kind not in SLOWNESS)
            return
        self.delays = said.delays
        if not said.suspicious:
            self._of_rings = ()
        self.rings.suspect(said.suspicious, now_s)
        known = [one for one in said.findings if one.rank is None or one.rank in self._known]
        self._change(self.conclusions.take(_together(known, self._of_rings), now_s))

    def end(self, now_s: float) -> None:
        """Nobody is watched any more."""
        self._change(self.conclusions.end(now_s))

    def _change(self, change: Change) -> None:
        self.begun.extend(change.begun)
        self.over.extend(change.over)

    def _join(self, moment: Moment, context: Context, plans: dict[int, Planned], ways: Seen | None) -> Said:
        """By the other thread, which alone uses what is used here."""
        summaries = moment.summaries()
        self._work.note(summaries)
        if ways is not None:
            self._links.look(ways)
        self._job.context = replace(context, work_s=self._work.explained_s(plans), cut_links=self._links.cut)
        seen = self._job.join(summaries)
        findings = (*seen.findings, *self._links.find_slow([one.tail for one in summaries]))
        del summaries
        give_back()
        return Said(findings, seen.suspicious, seen.delays)


def _read(traces: list[RankTrace], context: Context) -> Said:
    return Said(diagnose(traces, context).findings, None)


def _together(joined: list[Finding], of_rings: tuple[Finding, ...]) -> list[Finding]:
    """What windows and whole rings say; what names nobody is left out where the rings name somebody."""
    is_explained = any(one.rank is not None for one in of_rings)
    rings = {key_of(one): one for one in of_rings}
    kept = [one for one in joined if not is_explained or one.rank is not None or one.kind in SLOWNESS]
    return [*kept, *(one for key, one in rings.items() if key not in {key_of(other) for other in kept})]
