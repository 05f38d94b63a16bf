"""Replays pipelines in integer ticks, compiled: ``pipeline.simulator.replay``, fast enough to search with.

Every stage of a pipeline takes an equal part of a micro-batch's time, as ``simulate_pipeline`` has it. A test holds both
replays equal on random cases.
"""

import functools
from typing import NamedTuple

import numpy as np

from evermesh.parallelism.pipeline.schedule import PipelineSchedule
from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.pipelines.problem import Flags, Integers

KINDS = ("forward", "backward", "backward input", "backward weight")
FORWARD, BACKWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = range(4)
_IN_A_CIRCLE, _OTHERS_MISSING = -2, -1


class Orders(NamedTuple):
    """The orders of all pipeline ranks for some numbers of micro-batches, as one array."""

    actions: Integers
    """[action, 3]: kind (index into ``KINDS``), stage, micro-batch."""
    firsts: Integers
    """[number, rank + 1]: where the order of a rank begins; the next entry is where it ends."""
    rank_of: Integers
    """[stage]: the pipeline rank that holds it."""


class Gangs(NamedTuple):
    """Which HDP ranks run which micro-batch together; all are [micro-batch, HDP rank]."""

    root: Integers
    """One of them, the same for all."""
    size: Integers
    """How many they are."""
    following: Integers
    """The next of them; after the last comes the first."""


def pack_orders(schedule: PipelineSchedule, numbers: tuple[int, ...]) -> Orders:
    """The orders of ``schedule`` for these numbers of micro-batches."""
    packed = [_pack(schedule, number) for number in numbers]
    firsts = np.zeros((len(numbers), schedule.ranks + 1), dtype=np.int64)
    begin = 0
    for index, orders in enumerate(packed):
        sizes = [len(order) for order in orders]
        firsts[index] = begin + np.concatenate(([0], np.cumsum(sizes)))
        begin += sum(sizes)
    actions = np.concatenate([np.zeros((0, 3), dtype=np.int64), *(order for orders in packed for order in orders)])
    rank_of = np.array([schedule.rank_of(stage) for stage in range(schedule.num_stages)], dtype=np.int64)
    return Orders(actions, firsts, rank_of)


@functools.lru_cache(maxsize=512)
def _pack(schedule: PipelineSchedule, number: int) -> tuple[Integers, ...]:
    """The order of every rank, [action, 3]."""
    if not schedule.splits_backward and number & (number - 1):
        # n micro-batches are n + 1 with the last left out; split backward passes may move their weights
        above = _pack(schedule, 1 << number.bit_length())
        return tuple(order[order[:, 2] < number] for order in above)
    index = {kind: i for i, kind in enumerate(KINDS)}
    return tuple(
        np.array(
            [(index[action.kind], action.stage, action.micro_batch) for action in schedule.actions(rank, number)],
            dtype=np.int64,
        ).reshape(-1, 3)
        for rank in range(schedule.ranks)
    )


def no_gangs(num_micro_batches: int, num_ranks: int) -> Gangs:
    """Nobody runs anything together."""
    alone = np.tile(np.arange(num_ranks, dtype=np.int64), (num_micro_batches, 1))
    return Gangs(alone, np.ones_like(alone), alone.copy())


@compiled
def join(root: Integers, following: Integers, one: int, other: int) -> None:
    """Make the gangs of two ranks one; ``root`` and ``following`` are those of one micro-batch."""
    kept, dropped = min(root[one], root[other]), max(root[one], root[other])
    if kept == dropped:
        return
    member = following[dropped]
    root[dropped] = kept
    while member != dropped:
        root[member] = kept
        member = following[member]
    following[one], following[other] = following[other], following[one]


@compiled
def count_members(root: Integers) -> Integers:
    """``Gangs.size`` of ``Gangs.root``."""
    size = np.zeros_like(root)
    for index in range(root.shape[0]):
        for rank in range(root.shape[1]):
            size[index, root[index, rank]] += 1
        for rank in range(root.shape[1]):
            size[index, rank] = size[index, root[index, rank]]
    return size


@compiled
def together_ticks(ticks: Integers, gangs: Gangs) -> Integers:
    """Ticks of every action when members of a gang end together: [HDP rank, micro-batch, kind] from the same."""
    joint = ticks.copy()
    for index in range(gangs.root.shape[0]):
        for rank in range(gangs.root.shape[1]):
            member = gangs.following[index, rank]
            while member != rank:
                for kind in range(3):  # gradients of weights are nobody else's business
                    joint[rank, index, kind] = max(joint[rank, index, kind], ticks[member, index, kind])
                member = gangs.following[index, member]
    return joint


@compiled
def replay_ticks(orders: Orders, order_of: Integers, ticks: Integers, gangs: Gangs) -> int:
    """When the last rank is done; -1 when ranks wait for each other in a circle.

    Args:
        orders: of the schedule.
        order_of: [HDP rank] row of ``orders.firsts``.
        ticks: [HDP rank, micro-batch, kind] of one stage, from ``together_ticks``.
        gangs: who runs what together; members have at least as many micro-batches as its index says.
    """
    state = _start(orders, order_of, ticks.shape[1])
    stack, queued, height, last_stop = state.stack, state.queued, state.stack.size, 0
    num_ranks = order_of.size
    while height > 0:
        height -= 1
        q, r = stack[height] // num_ranks, stack[height] % num_ranks
        queued[q, r] = False
        while not state.waiting[q, r] and state.position[q, r] < orders.firsts[order_of[r], q + 1]:
            kind, stage, index = orders.actions[state.position[q, r]]
            ready = _message_at(orders, state, kind, stage, index, r)
            if ready < 0:
                break
            ready = max(ready, state.free_at[q, r])
            size = 1 if kind == BACKWARD_WEIGHT else gangs.size[index, r]
            if size > 1:
                ready = _meet(state, gangs, q, r, index, kind * orders.rank_of.size + stage, ready)
                if ready == _IN_A_CIRCLE:
                    return -1
                if ready == _OTHERS_MISSING:
                    break
            last_stop = max(last_stop, ready + ticks[r, index, kind])
            member = r
            for _ in range(size):
                state.waiting[q, member] = False
                state.free_at[q, member] = ready + ticks[r, index, kind]
                state.position[q, member] += 1
                receiver = _hand_on(orders, state, kind, stage, index, member, state.free_at[q, member])
                for place in ((q, member), (receiver, member)):
                    if place[0] >= 0 and place != (q, r) and not queued[place]:
                        queued[place] = True
                        stack[height] = place[0] * num_ranks + member
                        height += 1
                member = gangs.following[index, member]
    for q in range(orders.firsts.shape[1] - 1):
        for r in range(num_ranks):
            if state.position[q, r] < orders.firsts[order_of[r], q + 1]:
                return -1
    return last_stop


class _State(NamedTuple):
    """Of a replay; [pipeline rank, HDP rank] where nothing else is said."""

    position: Integers
    """The next action."""
    free_at: Integers
    arrived: Integers
    """[direction, HDP rank, micro-batch, stage]: when the message came that the stage needs; -1: not yet."""
    waiting: Flags
    """For the other members of its gang."""
    present: Integers
    """[pipeline rank, micro-batch, root of the gang]: members that are there."""
    meeting: Integers
    """The same: for what they wait."""
    latest: Integers
    """The same: when the last of them was ready."""
    stack: Integers
    """Places to look at."""
    queued: Flags


@compiled
def _start(orders: Orders, order_of: Integers, num_indices: int) -> _State:
    num_ranks, pp = order_of.size, orders.firsts.shape[1] - 1
    position = np.empty((pp, num_ranks), dtype=np.int64)
    for q in range(pp):
        for r in range(num_ranks):
            position[q, r] = orders.firsts[order_of[r], q]
    present = np.zeros((pp, num_indices, num_ranks), dtype=np.int64)
    return _State(
        position,
        np.zeros((pp, num_ranks), dtype=np.int64),
        np.full((2, num_ranks, num_indices, orders.rank_of.size), -1, dtype=np.int64),
        np.zeros((pp, num_ranks), dtype=np.bool_),
        present,
        np.zeros_like(present),
        np.zeros_like(present),
        np.arange(pp * num_ranks, dtype=np.int64),
        np.ones((pp, num_ranks), dtype=np.bool_),
    )


@compiled
def _message_at(orders: Orders, state: _State, kind: int, stage: int, index: int, rank: int) -> int:
    """When what the action cannot start without came; 0 when it needs nothing, -1 when it has not come."""
    if kind == FORWARD:
        return state.arrived[0, rank, index, stage] if stage > 0 else 0
    if kind == BACKWARD_WEIGHT or stage == orders.rank_of.size - 1:
        return 0
    return state.arrived[1, rank, index, stage]


@compiled
def _hand_on(orders: Orders, state: _State, kind: int, stage: int, index: int, rank: int, stop: int) -> int:
    """Send what the action gave; the pipeline rank that gets it, -1 for none."""
    if kind == FORWARD:
        if stage == orders.rank_of.size - 1:
            return -1
        state.arrived[0, rank, index, stage + 1] = stop
        return orders.rank_of[stage + 1]
    if kind == BACKWARD_WEIGHT or stage == 0:
        return -1
    state.arrived[1, rank, index, stage - 1] = stop
    return orders.rank_of[stage - 1]


@compiled
def _meet(state: _State, gangs: Gangs, q: int, rank: int, index: int, what: int, ready: int) -> int:
    """Join the gang; when all are there, the time of the last."""
    at = (q, index, gangs.root[index, rank])
    if state.present[at] == 0:
        state.meeting[at], state.latest[at] = what, ready
    elif state.meeting[at] != what:
        return _IN_A_CIRCLE
    state.latest[at] = max(state.latest[at], ready)
    state.present[at] += 1
    if state.present[at] < gangs.size[index, rank]:
        state.waiting[q, rank] = True
        return _OTHERS_MISSING
    state.present[at] = 0
    return state.latest[at]
