"""Which wave is which micro-batch of every pipeline, and how long that takes."""

import numpy as np

from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.pipeline.schedule import PipelineSchedule
from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.pipelines.problem import Flags, Integers, Placement
from evermesh.parallelism.planner.pipelines.profile import wave_replay
from evermesh.parallelism.planner.pipelines.replay import (
    Gangs,
    Orders,
    join,
    pack_orders,
    replay_ticks,
    together_ticks,
)

_MOVES = 200
"""Of waves that are tried for one order."""


def replayed(schedule: PipelineSchedule, counts: Integers, parts: Integers, gangs: Gangs) -> int:
    """Ticks until the last is done."""
    numbers, order_of = np.unique(counts, return_inverse=True)
    orders = pack_orders(schedule, tuple(numbers.tolist()))
    total = replay_ticks(orders, order_of.astype(np.int64), together_ticks(parts, gangs), gangs)
    if total < 0:
        raise PlanInvalid("the pipelines wait for each other in a circle; the plan cannot run.")
    return int(total)


@compiled
def arrange(
    placement: Placement, used: Flags, position: Integers, groups: Integers
) -> tuple[Integers, Integers, Integers, Integers]:
    """Which wave is which micro-batch of every rank, how many each has, and who runs which together.

    ``used`` [wave, rank] says who has sequences, ``position`` [wave] when pipelines run it. Ranks that are in no ring and
    keep step with nobody leave out what is empty, the others only what is empty at the end.
    """
    num_waves, num_ranks = used.shape
    root = np.empty((num_waves, num_ranks), dtype=np.int64)
    following = np.empty((num_waves, num_ranks), dtype=np.int64)
    counts = np.zeros(num_ranks, dtype=np.int64)
    in_step = np.zeros(num_ranks, dtype=np.bool_)
    wave_at = np.empty((num_ranks, num_waves), dtype=np.int64)
    for rank in range(num_ranks):
        root[:, rank], following[:, rank] = rank, rank
        in_step[rank] = groups[rank] >= 0
    for index in range(placement.wave.size):
        at, first = position[placement.wave[index]], placement.first[index]
        for rank in range(first, first + placement.ring[index]):
            counts[rank] = max(counts[rank], at + 1)
            if placement.ring[index] > 1:
                in_step[rank] = True
                join(root[at], following[at], first, rank)
    for rank in range(num_ranks):
        leader = groups[rank]
        if leader >= 0:
            counts[leader] = max(counts[leader], counts[rank])
    for rank in range(num_ranks):
        leader = groups[rank]
        if leader >= 0:
            counts[rank] = counts[leader]
            for at in range(counts[rank]):
                join(root[at], following[at], leader, rank)
        for wave in range(num_waves):
            wave_at[rank, position[wave]] = wave
        if not in_step[rank]:
            counts[rank] = 0
            for at in range(num_waves):
                wave = wave_at[rank, at]
                if used[wave, rank]:
                    wave_at[rank, counts[rank]] = wave
                    counts[rank] += 1
    return wave_at, counts, root, following


@compiled
def better_order(orders: Orders, parts: Integers, sequence: Integers) -> Integers:
    """Move one wave at a time to where one pipeline with all waves ends earlier, while that helps."""
    number = sequence.size
    best = sequence.copy()
    least = wave_replay(orders, parts[best])
    budget = _MOVES
    improved = True
    while improved:
        improved = False
        for origin in range(number):
            step = 1
            while step < number:
                for target in (origin - step, origin + step):
                    if target < 0 or target >= number or budget == 0:
                        continue
                    budget -= 1
                    moved = _moved(best, origin, target)
                    total = wave_replay(orders, parts[moved])
                    if total < least:
                        best, least, improved = moved, total, True
                step *= 2
    return best


@compiled
def _moved(sequence: Integers, origin: int, target: int) -> Integers:
    """With the entry at ``origin`` at ``target``, those between them one place on."""
    moved = sequence.copy()
    step = 1 if target > origin else -1
    for at in range(origin, target, step):
        moved[at] = sequence[at + step]
    moved[target] = sequence[origin]
    return moved
