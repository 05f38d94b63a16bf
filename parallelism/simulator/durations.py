"""How long ranks take for what they run together, on a cluster on which not all is well.

A rank's *own* time is what the cost model says it needs if nobody keeps it waiting; its speed divides it (``Pool.speeds``,
``SlowRank``). What comes over a slow link takes longer, and hides less well behind attention.
"""

import graphlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evermesh.parallelism.batch_plan import MicroBatch, Piece
from evermesh.parallelism.cost import CostModel, Parts, Sharing
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.simulator.aggregate import offload_s, sharing_of
from evermesh.parallelism.simulator.scenario import Scenario
from evermesh.parallelism.simulator.stages import stage_seconds
from evermesh.parallelism.simulator.tasks import Task

Seconds = NDArray[np.float64]


class Run(NamedTuple):
    """One rank's part of what a gang runs."""

    start_s: float
    stop_s: float
    waited_s: float
    """Inside, for the others."""


class Durations:
    """Times of what a plan runs under a scenario."""

    def __init__(self, lengths: Sequence[int], cost: CostModel, stages: int, scenario: Scenario) -> None:
        self.lengths, self.cost, self.stages, self.scenario = lengths, cost, stages, scenario
        self.links = {(link.source, link.target): link.factor for link in scenario.slow_links}
        self._behind_slow_links = {target for _, target in self.links}
        self._speeds = _speeds(scenario)
        self._sharings: dict[int, Sharing] = {}
        self._parts: dict[tuple[int, bool], Parts] = {}

    def together(self, members: Sequence[int], tasks: Sequence[Task], arrived_s: Sequence[float]) -> list[Run]:
        """When the HDP ranks ``members`` run a task each; the last of them has arrived now.

        With ``Scenario.layers`` everyone begins when it arrives and waits in the steps of its rings; without, all begin and
        end together.
        """
        start = max(arrived_s)
        own = [self.own_s(member, task) for member, task in zip(members, tasks, strict=True)]
        if len(members) == 1 or self.scenario.layers is None:
            ends = [self.end_s(member, start, seconds) for member, seconds in zip(members, own, strict=True)]
            stop = max(ends)
            return [Run(start, stop, stop - end) for end in ends]
        stops = self._by_layers(members, tasks, arrived_s)
        runs = []
        for member, begin, seconds, stop in zip(members, arrived_s, own, stops, strict=True):
            stop = max(stop, start)  # it cannot be through before the last one is there
            runs.append(Run(begin, stop, max(0.0, stop - self.end_s(member, begin, seconds))))
        return runs

    def own_s(self, rank: int, task: Task) -> float:
        """The own time of an HDP rank at nominal speed."""
        pieces = (self.parts(piece, rank, task.micro_batch).seconds for piece in task.micro_batch.pieces)
        offloading = offload_s(task.micro_batch, self.lengths, self.cost)
        return self._of_stage(self.cost.micro_batch_s + sum(pieces) + offloading, task)

    def end_s(self, rank: int, start_s: float, own_s: float) -> float:
        """When an HDP rank that begins at ``start_s`` has done what takes ``own_s`` at nominal speed."""
        speed, *changes = self._speeds[rank]
        for change in changes:
            if change.from_s > start_s:
                end = start_s + own_s / speed.factor
                if end <= change.from_s:
                    return end
                own_s -= (change.from_s - start_s) * speed.factor
                start_s = change.from_s
            speed = change
        return start_s + own_s / speed.factor

    def speed(self, rank: int, at_s: float) -> float:
        """Speed of an HDP rank, 1 being nominal."""
        return [change.factor for change in self._speeds[rank] if change.from_s <= at_s][-1]

    def parts(self, piece: Piece, rank: int, micro_batch: MicroBatch) -> Parts:
        """What an HDP rank spends on its piece of a sequence."""
        recomputed = micro_batch.recompute == "block"
        key = piece.sequence, recomputed
        if key not in self._parts:  # all members of a ring spend the same
            sharing = self._sharing(piece)
            self._parts[key] = self.cost.parts(self.lengths[piece.sequence], sharing, recomputed=recomputed)
        parts = self._parts[key]
        if rank not in self._behind_slow_links or len(piece.ring) == 1:
            return parts
        passed, exchanged = self._slowest(piece, rank)
        return parts._replace(passed=parts.passed / passed, exchanged=parts.exchanged / exchanged)

    def _of_stage(self, seconds: float, task: Task) -> float:
        return seconds if task.kind is None else stage_seconds(seconds / self.stages, task.micro_batch).of(task.kind)

    def _sharing(self, piece: Piece) -> Sharing:
        found = self._sharings.get(piece.sequence)
        if found is None:
            found = self._sharings[piece.sequence] = sharing_of(piece, self.scenario.pool)
        return found

    def _slowest(self, piece: Piece, rank: int) -> tuple[float, float]:
        """Factors of the links on which ``rank`` gets keys and values of its neighbour, and parts of heads."""
        ring, heads = piece.ring, piece.heads
        index = ring.index(rank)
        source = ring[(index + heads) % len(ring)]
        group = ring[index // heads * heads :][:heads]
        return self.links.get((source, rank), 1.0), min(self.links.get((other, rank), 1.0) for other in group)

    def _by_layers(self, members: Sequence[int], tasks: Sequence[Task], arrived_s: Sequence[float]) -> list[float]:
        """When each member is through all layers, forward and backward."""
        assert self.scenario.layers is not None
        share = self._of_stage(1.0, tasks[0])
        passes = max(1, round(2 * self.scenario.layers * share))
        scale = share / passes
        clock = np.array(arrived_s, dtype=np.float64)
        in_ring = {id(p) for task in tasks for p in task.micro_batch.pieces if len(p.ring) > 1}
        alone = np.zeros(len(members))
        for index, (member, task) in enumerate(zip(members, tasks, strict=True)):
            alone[index] = self.cost.micro_batch_s + offload_s(task.micro_batch, self.lengths, self.cost)
            for piece in task.micro_batch.pieces:
                parts = self.parts(piece, member, task.micro_batch)
                alone[index] += parts.products if id(piece) in in_ring else parts.seconds
        rings = self._rings(members, tasks)
        in_lock_step = tasks[0].kind is not None
        for _ in range(passes):
            speeds = np.array([self.speed(member, at_s) for member, at_s in zip(members, clock.tolist(), strict=True)])
            clock += alone * scale / speeds
            for ring in rings:
                clock[ring.places] = ring.after(clock[ring.places], scale, speeds[ring.places])
            if in_lock_step:
                clock[:] = clock.max()
        return [float(at_s) for at_s in clock]

    def _rings(self, members: Sequence[int], tasks: Sequence[Task]) -> "list[_RingSteps]":
        """The rings inside a gang, in an order that is that of every member."""
        places = {member: place for place, member in enumerate(members)}
        pieces: dict[int, Piece] = {}
        earlier: dict[int, list[int]] = {}
        for task in tasks:
            mine = [piece for piece in task.micro_batch.pieces if len(piece.ring) > 1]
            for index, piece in enumerate(mine):
                pieces[piece.sequence] = piece
                earlier.setdefault(piece.sequence, []).extend([mine[index - 1].sequence] if index else [])
        try:
            order = list(graphlib.TopologicalSorter(earlier).static_order())
        except graphlib.CycleError as error:
            raise PlanInvalid(f"rings of sequences {error.args[1]} wait for each other in a circle.") from error
        found = []
        for sequence in order:
            piece = pieces[sequence]
            parts = [self.parts(piece, member, tasks[places[member]].micro_batch) for member in piece.ring]
            found.append(_RingSteps(np.array([places[member] for member in piece.ring]), piece.heads, parts))
        return found


class _RingSteps:
    """One ring, step by step.

    A block goes on when its sender begins a step with it and its receiver is there; a member begins its next step when it
    has computed, has received, and has sent. Attention is divided evenly among the steps that something arrives behind.
    """

    def __init__(self, places: NDArray[np.int_], heads: int, parts: Sequence[Parts]) -> None:
        self.places, self.heads = places, heads
        self.groups = len(places) // heads
        self.gathers = parts[0].gathers or self.groups == 1
        self.attention, self.passed, self.exchanged, self.fixed = np.array(
            [[part.attention, part.passed, part.exchanged, part.steps] for part in parts]
        ).T

    def after(self, clock: Seconds, scale: float, speeds: Seconds) -> Seconds:
        """When every member is through, from when it begins; ``scale`` is the part of all layers."""
        attention, fixed = self.attention * scale / speeds, self.fixed * scale / speeds
        if self.heads > 1:
            exchanged = (self.exchanged * scale / speeds).reshape(-1, self.heads).max(axis=1, keepdims=True)
            clock = (
                (clock.reshape(-1, self.heads).max(axis=1, keepdims=True) + exchanged)
                .repeat(self.heads, axis=1)
                .ravel()
            )
        if self.gathers:
            if self.groups > 1:
                clock = np.full_like(clock, clock.max() + (self.passed * scale / speeds).max())
            return clock + attention + fixed
        steps = self.groups - 1
        compute, link = attention / steps, self.passed * scale / speeds / steps
        for _ in range(steps):
            # what arrives here, and what leaves here, needs both ends to be there
            arrives = np.maximum(clock, np.roll(clock, -self.heads)) + link
            clock = np.maximum(np.maximum(clock + compute, arrives), np.roll(arrives, self.heads))
            clock = clock + fixed / steps
        return clock


def _speeds(scenario: Scenario) -> "list[tuple[_Speed, ...]]":
    """By HDP rank, its speed from the start on and every change of it, by time."""
    found: list[tuple[_Speed, ...]] = [(_Speed(0.0, speed),) for speed in scenario.pool.speeds]
    for slow in sorted(scenario.slow_ranks, key=lambda slow: slow.from_s):
        before = found[slow.rank]
        found[slow.rank] = (*before, _Speed(slow.from_s, before[-1].factor * slow.factor))
    return found


class _Speed(NamedTuple):
    from_s: float
    factor: float
