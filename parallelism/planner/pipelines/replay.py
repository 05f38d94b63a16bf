"""Replays pipelines in integer ticks, compiled: ``pipeline.simulator.replay``, fast enough to search with.

Every stage of a pipeline takes an equal part of a micro-batch's time, as ``simulate_pipeline`` has it. A test holds both
replays equal on random cases.
"""

import functools
from typing import NamedTuple

import numpy as np

from evermesh.parallelism.pipeline.schedule import PipelineSchedule
from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.pipelines.problem import Integers

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
    actions, firsts, rank_of = orders
    num_ranks, num_stages = order_of.size, rank_of.size
    position = _first_positions(firsts, order_of)
    pp = position.shape[0]
    free_at = np.zeros((pp, num_ranks), dtype=np.int64)
    arrived = np.full((2, num_ranks, ticks.shape[1], num_stages), -1, dtype=np.int64)
    waiting = np.zeros((pp, num_ranks), dtype=np.bool_)  # for the other members of its gang
    meetings = np.zeros((pp, ticks.shape[1], num_ranks, 3), dtype=np.int64)
    stack, queued = np.arange(pp * num_ranks), np.ones((pp, num_ranks), dtype=np.bool_)
    height, last_stop = stack.size, 0
    while height > 0:
        height -= 1
        q, r = stack[height] // num_ranks, stack[height] % num_ranks
        queued[q, r] = False
        while not waiting[q, r] and position[q, r] < firsts[order_of[r], q + 1]:
            at = position[q, r]
            kind, stage, index = actions[at, 0], actions[at, 1], actions[at, 2]
            ready = _message_at(arrived, kind, stage, index, r)
            if ready < 0:
                break
            ready = max(ready, free_at[q, r])
            size = 1 if kind == BACKWARD_WEIGHT else gangs.size[index, r]
            if size > 1:
                ready = _meet(meetings[q, index, gangs.root[index, r]], size, kind * num_stages + stage, ready)
                if ready == _IN_A_CIRCLE:
                    return -1
                if ready == _OTHERS_MISSING:
                    waiting[q, r] = True
                    break
            stop = ready + ticks[r, index, kind]
            last_stop = max(last_stop, stop)
            member = r
            for _ in range(size):
                waiting[q, member] = False
                free_at[q, member] = stop
                position[q, member] += 1
                after = _hand_on(arrived, kind, stage, index, member, stop)
                receiver = rank_of[after] if after >= 0 else q
                if not queued[receiver, member] and (receiver != q or member != r):
                    queued[receiver, member] = True
                    stack[height] = receiver * num_ranks + member
                    height += 1
                if member != r and not queued[q, member]:
                    queued[q, member] = True
                    stack[height] = q * num_ranks + member
                    height += 1
                if size > 1:
                    member = gangs.following[index, member]
    for q in range(pp):
        for r in range(num_ranks):
            if position[q, r] < firsts[order_of[r], q + 1]:
                return -1
    return last_stop


@compiled
def _first_positions(firsts: Integers, order_of: Integers) -> Integers:
    """Where the order of every rank begins: [pipeline rank, HDP rank]."""
    position = np.empty((firsts.shape[1] - 1, order_of.size), dtype=np.int64)
    for q in range(position.shape[0]):
        for r in range(position.shape[1]):
            position[q, r] = firsts[order_of[r], q]
    return position


@compiled
def _message_at(arrived: Integers, kind: int, stage: int, index: int, rank: int) -> int:
    """When what the action cannot start without came; 0 when it needs nothing, -1 when it has not come.

    ``arrived`` is [direction, HDP rank, micro-batch, stage that needs it].
    """
    if kind == FORWARD:
        return arrived[0, rank, index, stage] if stage > 0 else 0
    if kind == BACKWARD_WEIGHT or stage == arrived.shape[3] - 1:
        return 0
    return arrived[1, rank, index, stage]


@compiled
def _hand_on(arrived: Integers, kind: int, stage: int, index: int, rank: int, stop: int) -> int:
    """Send what the action gave; the stage that needs it, -1 for none."""
    if kind == BACKWARD_WEIGHT:
        return -1
    after = stage + 1 if kind == FORWARD else stage - 1
    if after < 0 or after == arrived.shape[3]:
        return -1
    arrived[0 if kind == FORWARD else 1, rank, index, after] = stop
    return after


@compiled
def _meet(meeting: Integers, size: int, what: int, ready: int) -> int:
    """Join a gang of ``size``; when all are there, the time of the last.

    ``meeting`` holds how many are there, what for, and when the last of them was ready.
    """
    if meeting[0] == 0:
        meeting[1], meeting[2] = what, ready
    elif meeting[1] != what:
        return _IN_A_CIRCLE
    meeting[2] = max(meeting[2], ready)
    meeting[0] += 1
    if meeting[0] < size:
        return _OTHERS_MISSING
    meeting[0] = 0
    return meeting[2]
