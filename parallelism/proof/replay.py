"""When the last rank of a plan is done, replayed without the planner's and the simulator's code.

What rings or lock-steps join (a *gang*) begins when the last member is there and ends together. Without a pipeline a
micro-batch runs in one go; in waves it runs action by action, in the order of the schedule, on stages of equal parts.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pipeline.schedule import Action, Message
from evermesh.parallelism.proof.columns import Columns
from evermesh.parallelism.proof.durations import Floats
from evermesh.parallelism.rank_work import Integers


def replay_free_s(columns: Columns, seconds: Floats) -> float | None:
    """Of ranks that hold the whole model; ``seconds`` of every micro-batch, [M]. None: they wait in a circle."""
    gang, joint, sizes = _gangs(columns, seconds, np.zeros((0, 2), np.int64))
    alone = np.bincount(gang)[gang] == 1
    ends = np.concatenate([np.zeros(1), np.cumsum(np.where(alone, seconds, 0.0))])
    queues, gangs = np.flatnonzero(~alone), gang.tolist()
    first = np.searchsorted(columns.rank[queues], np.arange(len(columns.rank_start))).tolist()
    places = queues.tolist()
    waited = ends[columns.rank_start[:-1]].tolist()
    before = ends[queues].tolist()
    members: dict[int, list[int]] = defaultdict(list)
    free, position, began = [0.0] * (len(first) - 1), first[:-1], [0.0] * len(joint)
    ready = list(range(len(free)))
    while ready:
        rank = ready.pop()
        if position[rank] == first[rank + 1]:
            continue
        at = position[rank]
        here = gangs[places[at]]
        began[here] = max(began[here], free[rank] + before[at] - waited[rank])
        waited[rank] = before[at]
        members[here].append(rank)
        if len(members[here]) == sizes[here]:
            stop = began[here] + joint[here]
            for member in members[here]:
                free[member] = stop
                position[member] += 1
            ready += members[here]
    if position != first[1:]:
        return None
    last = ends[columns.rank_start[1:]] - np.asarray(waited) + np.asarray(free)
    return float(last.max(initial=0.0))


def _gangs(columns: Columns, seconds: Floats, more: Integers) -> tuple[Integers, list[float], list[int]]:
    """The gang of every micro-batch; of every gang its longest micro-batch, seconds, and its size.

    ``more`` are pairs of micro-batches that something else than a ring joins.
    """
    count, in_ring = len(columns.rank), columns.in_ring
    one = np.concatenate([columns.micro_batch[in_ring], more[:, 0]])
    other = np.concatenate([count + columns.sequence[in_ring], more[:, 1]])
    nodes = count + len(columns.lengths)
    edges = coo_array((np.ones(len(one), np.bool_), (one, other)), shape=(nodes, nodes))
    gang = connected_components(edges, directed=False)[1][:count].astype(np.int64)
    number = int(gang.max(initial=-1)) + 1
    joint = np.zeros(number)
    np.maximum.at(joint, gang, seconds)
    return gang, joint.tolist(), np.bincount(gang, minlength=number).tolist()


class _Meeting(NamedTuple):
    """Where the members of a gang wait for each other: pipeline rank, action, gang."""

    pipeline_rank: int
    kind: str
    stage: int
    gang: int


def replay_waves_s(columns: Columns, seconds: Floats, layout: Layout) -> float | None:
    """Of layouts that run in waves; ``seconds`` of every micro-batch, [M]. None: they wait in a circle."""
    return _Waves(columns, seconds, layout).run()


class _Waves:
    """Every pipeline rank of every HDP rank goes through its actions; whoever lacks something is visited again later."""

    def __init__(self, columns: Columns, seconds: Floats, layout: Layout) -> None:
        self.schedule, self.first = layout.pipeline, columns.rank_start.tolist()
        parts = seconds / self.schedule.num_stages / (3.0 + columns.recomputed)
        by_kind = {
            "forward": parts,
            "backward": parts * (2.0 + columns.recomputed),
            "backward input": parts * (1.0 + columns.recomputed),
        }
        lock_steps = _same_steps(columns, layout)
        self.joint = {kind: _gangs(columns, of_kind, lock_steps)[1] for kind, of_kind in by_kind.items()}
        gang, _, self.sizes = _gangs(columns, seconds, lock_steps)
        self.gang, self.weight = gang.tolist(), parts.tolist()
        counts = np.diff(columns.rank_start).tolist()
        self.orders = {
            (stage_rank, rank): self.schedule.actions(stage_rank, count)
            for rank, count in enumerate(counts)
            for stage_rank in range(self.schedule.ranks)
        }
        self.position, self.free = dict.fromkeys(self.orders, 0), dict.fromkeys(self.orders, 0.0)
        self.arrived: dict[tuple[Message, int], float] = {}
        self.there: dict[_Meeting, list[int]] = defaultdict(list)
        self.began: dict[_Meeting, float] = defaultdict(float)
        self.ready = list(self.orders)

    def run(self) -> float | None:
        """When the last rank is done; None: some wait in a circle."""
        while self.ready:
            self._visit(*self.ready.pop())
        if any(self.position[place] < len(order) for place, order in self.orders.items()):
            return None
        return max(self.free.values(), default=0.0)

    def _visit(self, pipeline_rank: int, rank: int) -> None:
        """Run the next action of a rank, if all that it needs is there."""
        place = (pipeline_rank, rank)
        if self.position[place] == len(self.orders[place]):
            return
        action = self.orders[place][self.position[place]]
        needed = self.schedule.received(action)
        if needed is not None and (needed, rank) not in self.arrived:
            return
        start = self.free[place] if needed is None else max(self.free[place], self.arrived[needed, rank])
        micro_batch = self.first[rank] + action.micro_batch
        if action.kind == "backward weight":
            self._end(pipeline_rank, rank, action, start + self.weight[micro_batch])
            return
        gang = self.gang[micro_batch]
        meeting = _Meeting(pipeline_rank, action.kind, action.stage, gang)
        if rank in self.there[meeting]:
            return
        self.there[meeting].append(rank)
        self.began[meeting] = max(self.began[meeting], start)
        if len(self.there[meeting]) == self.sizes[gang]:
            for member in self.there[meeting]:
                self._end(pipeline_rank, member, action, self.began[meeting] + self.joint[action.kind][gang])

    def _end(self, pipeline_rank: int, rank: int, action: Action, stop: float) -> None:
        self.free[pipeline_rank, rank] = stop
        self.position[pipeline_rank, rank] += 1
        self.ready.append((pipeline_rank, rank))
        given = self.schedule.sent(action)
        if given is not None:
            self.arrived[given, rank] = stop
            self.ready.append((self.schedule.rank_of(given.stage), rank))


def _same_steps(columns: Columns, layout: Layout) -> Integers:
    """Pairs of micro-batches of one lock-step: those of the first rank of a group with those of every other, [pairs, 2]."""
    pairs = [
        np.column_stack(
            [
                np.arange(columns.rank_start[group[0]], columns.rank_start[group[0] + 1]),
                np.arange(columns.rank_start[rank], columns.rank_start[rank + 1]),
            ]
        )
        for group in layout.lock_step_groups
        for rank in group[1:]
    ]
    return np.concatenate([np.zeros((0, 2), np.int64), *pairs])
