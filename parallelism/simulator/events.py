"""Replays a plan event by event on a cluster on which ranks and links may be slow and ranks may be lost.

The events are ends of tasks and losses of ranks, in the order of their times (of equals, ends first, then by rank), so the
same plan and scenario give the same timeline everywhere. A task begins when all who run it together are there and the
messages it needs have come; messages of a pipeline take no time. Who comes last is who the others waited for.

When nothing is slow, the timeline is that of ``simulate`` and ``simulate_pipeline``.
"""

import heapq
from dataclasses import dataclass

from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.simulator.durations import Durations, Run
from evermesh.parallelism.simulator.scenario import Scenario
from evermesh.parallelism.simulator.tasks import Program, Task, program_of
from evermesh.parallelism.simulator.timeline import Cause, Span, Timeline, Wait

_END, _LOSS = 0, 1


@dataclass(frozen=True, slots=True)
class Blocked:
    """A rank that waits for ever."""

    rank: int
    since_s: float
    micro_batch: int | None
    """What it is in or before; None: it has done all and waits to sum gradients."""
    for_rank: int
    """Whom it waits for."""
    root: int
    """The lost rank behind that."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a step."""

    timeline: Timeline
    synchronization_s: float
    lost: tuple[int, ...] = ()
    """Ranks that were lost before the step was over; with any, it never is."""
    blocked: tuple[Blocked, ...] = ()
    """All other ranks then, ascending."""
    undone_micro_batches: int = 0
    undone_tokens: int = 0
    """Of micro-batches that did not end in all stages."""

    @property
    def step_s(self) -> float | None:
        """Seconds until gradients are summed; None: that never happens."""
        return None if self.lost else self.timeline.makespan_s + self.synchronization_s


def simulate_events(plan: BatchPlan, layout: Layout, cost_model: CostModel, scenario: Scenario) -> Outcome:
    """Replay ``plan`` under ``scenario``; ``layout`` says the pipeline and which ranks share experts or parameters.

    Raises:
        PlanInvalid: ranks wait for each other in a circle, a ring is not complete, or the pool is of another size.
    """
    if len(plan.ranks) != len(scenario.pool):
        raise PlanInvalid(f"a plan for {len(plan.ranks)} HDP ranks on a pool of {len(scenario.pool)}.")
    program = program_of(plan, layout)
    durations = Durations(plan.lengths, cost_model, program.stages, scenario)
    return _Engine(program, durations, scenario).run()


class _Engine:
    def __init__(self, program: Program, durations: Durations, scenario: Scenario) -> None:
        self.program, self.durations, self.scenario = program, durations, scenario
        number = len(program.ranks)
        self.position = [0] * number
        self.arrived_s = [0.0] * number
        self.running: dict[int, Run] = {}
        self.missing = [len(members) for members in program.gangs]
        """Of every gang, ranks and messages that are not there yet."""
        for tasks in program.ranks:
            for task in tasks:
                self.missing[task.gang] += task.receives_from is not None
        self.received_s: dict[tuple[int, int], float] = {}
        """When messages came, by sender and gang."""
        self.lost: dict[int, float] = {}
        self.cut_off: dict[int, int] = {}
        """Ranks that hang in the middle of a task, and who was lost there."""
        self.spans: list[list[Span]] = [[] for _ in range(number)]
        self.waits: list[list[Wait]] = [[] for _ in range(number)]
        self.events: list[tuple[float, int, int]] = []

    def run(self) -> Outcome:
        for rank in range(len(self.program.ranks)):
            self._arrive(rank, 0.0)
        for lost in self.scenario.lost:
            for stage in range(self.program.pp):
                heapq.heappush(self.events, (lost.at_s, _LOSS, lost.rank * self.program.pp + stage))
        while self.events:
            now, event, rank = heapq.heappop(self.events)
            if event == _LOSS:
                self._lose(rank, now)
            elif rank not in self.cut_off and rank not in self.lost:
                self._end(rank, now)
        return self._outcome()

    def _task(self, rank: int) -> Task | None:
        """What ``rank`` is at; None: it has done all."""
        tasks = self.program.ranks[rank]
        return tasks[self.position[rank]] if self.position[rank] < len(tasks) else None

    def _arrive(self, rank: int, now: float) -> None:
        self.arrived_s[rank] = now
        task = self._task(rank)
        if task is not None:
            self._there(task.gang, now, rank, receiver=None)

    def _there(self, gang: int, now: float, rank: int, receiver: int | None) -> None:
        """``rank`` is there, or its message to ``receiver`` is; if nothing else is missing, the gang begins."""
        self.missing[gang] -= 1
        if self.missing[gang]:
            return
        members = self.program.gangs[gang]
        tasks = [task for member in members if (task := self._task(member)) is not None]
        ready = [
            max(self.arrived_s[member], self.received_s.get((task.receives_from, gang), 0.0))
            if task.receives_from is not None
            else self.arrived_s[member]
            for member, task in zip(members, tasks, strict=True)
        ]
        hdp_ranks = [self.program.hdp_rank(member) for member in members]
        for member, run in zip(members, self.durations.together(hdp_ranks, tasks, ready), strict=True):
            self.running[member] = run
            heapq.heappush(self.events, (run.stop_s, _END, member))
            if run.start_s > self.arrived_s[member]:
                cause, last = self._cause(member, rank, receiver)
                self.waits[member].append(Wait(member, self.arrived_s[member], run.start_s, cause, last))

    def _cause(self, member: int, last: int, receiver: int | None) -> tuple[Cause, int]:
        if receiver is not None:
            if member == receiver:
                return "pipeline", last
            last = receiver
        if not self.program.in_lock_step:
            return "ring partner", last
        task = self._task(member)
        hdp_rank = self.program.hdp_rank(last)
        in_ring = task is not None and any(hdp_rank in piece.ring for piece in task.micro_batch.pieces)
        return ("ring partner" if in_ring else "lock-step"), last

    def _end(self, rank: int, now: float) -> None:
        task = self._task(rank)
        assert task is not None
        self._add_span(rank, now, self.running.pop(rank))
        self.position[rank] += 1
        if task.sends_to is not None:
            self.received_s[rank, task.sends_to] = now
            receiver = next(
                member
                for member in self.program.gangs[task.sends_to]
                if self.program.hdp_rank(member) == self.program.hdp_rank(rank)
            )
            self._there(task.sends_to, now, rank, receiver)
        self._arrive(rank, now)

    def _add_span(self, rank: int, stop_s: float, run: Run, *, is_cut_off: bool = False) -> None:
        task = self._task(rank)
        assert task is not None
        pieces = task.micro_batch.pieces
        self.spans[rank].append(
            Span(
                rank=rank,
                micro_batch=task.index,
                start_s=run.start_s,
                stop_s=stop_s,
                sequences=tuple(piece.sequence for piece in pieces),
                ring_size=max((len(piece.ring) for piece in pieces), default=1),
                num_tokens=task.micro_batch.num_tokens,
                is_backward=task.kind not in (None, "forward"),
                waited_s=0.0 if is_cut_off else run.waited_s,
                is_cut_off=is_cut_off,
            )
        )

    def _lose(self, rank: int, now: float) -> None:
        if rank in self.lost:
            return
        task, run = self._task(rank), self.running.get(rank)
        self.lost[rank] = now
        if task is None:
            return
        if run is None:
            self.missing[task.gang] += 1  # what it waits at never begins
            return
        for member in self.program.gangs[task.gang]:
            if member in self.running and member not in self.cut_off:
                self.cut_off[member] = rank
                self._add_span(member, now, self.running.pop(member), is_cut_off=True)

    def _outcome(self) -> Outcome:
        makespan = max((spans[-1].stop_s for spans in self.spans if spans), default=0.0)
        unfinished = [rank for rank in range(len(self.program.ranks)) if self._task(rank) is not None]
        synchronization_s = self._synchronization_s()
        lost = {rank for rank, at_s in self.lost.items() if self._task(rank) or at_s < makespan + synchronization_s}
        if unfinished and not lost:
            raise PlanInvalid(f"ranks {unfinished[:8]} wait for each other in a circle; the plan cannot run.")
        if not lost:
            self._wait_for_the_last(makespan)
        timeline = Timeline(
            tuple(span for spans in self.spans for span in spans),
            self.program.labels(),
            tuple(wait for waits in self.waits for wait in waits),
            tuple(self._node(rank) for rank in range(len(self.program.ranks))),
        )
        undone = {
            (self.program.hdp_rank(rank), task.index): task.micro_batch.num_tokens
            for rank in unfinished
            for task in self.program.ranks[rank][self.position[rank] :]
        }
        return Outcome(
            timeline, synchronization_s, tuple(sorted(lost)), self._blocked(lost), len(undone), sum(undone.values())
        )

    def _node(self, rank: int) -> int:
        """Every stage of the pipelines has nodes of its own."""
        nodes = self.scenario.pool.nodes
        return rank % self.program.pp * (nodes[-1] + 1) + nodes[self.program.hdp_rank(rank)]

    def _synchronization_s(self) -> float:
        synchronization, ranks = self.scenario.synchronization, len(self.scenario.pool)
        if synchronization is None:
            return 0.0
        used = [self.durations.links.get((rank, (rank + 1) % ranks), 1.0) for rank in range(ranks)]
        return synchronization.seconds(ranks, min(used))

    def _wait_for_the_last(self, makespan: float) -> None:
        """Add what ranks wait at the end of the step."""
        ends = [spans[-1].stop_s if spans else 0.0 for spans in self.spans]
        last = ends.index(makespan) if makespan in ends else 0
        for rank, end in enumerate(ends):
            if end < makespan:
                self.waits[rank].append(Wait(rank, end, makespan, "end of step", last))

    def _blocked(self, lost: set[int]) -> tuple[Blocked, ...]:
        if not lost:
            return ()
        found = {rank: self._waits_for(rank, min(lost)) for rank in range(len(self.program.ranks)) if rank not in lost}
        blocked = []
        for rank, other in found.items():
            seen = {rank}
            while other not in lost and other not in seen:
                seen.add(other)
                other = found[other]
            root = other if other in lost else min(lost)
            task = self._task(rank)
            since = self.spans[rank][-1].stop_s if rank in self.cut_off else self.arrived_s[rank]
            blocked.append(Blocked(rank, since, None if task is None else task.index, found[rank], root))
        return tuple(blocked)

    def _waits_for(self, rank: int, first_lost: int) -> int:
        """Whom ``rank``, which is not lost, waits for."""
        task = self._task(rank)
        if task is None:
            return first_lost
        if rank in self.cut_off:
            return self.cut_off[rank]
        members = self.program.gangs[task.gang]
        for member in members:
            at = self._task(member)
            if member in self.lost or at is None or at.gang != task.gang or member in self.cut_off:
                return member
        for member in members:
            at = self._task(member)
            if at is not None and at.receives_from is not None and (at.receives_from, task.gang) not in self.received_s:
                return at.receives_from if member == rank else member
        raise AssertionError(f"rank {rank} waits for nobody")
