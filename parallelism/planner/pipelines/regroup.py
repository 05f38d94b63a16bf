"""Makes the micro-batches of a wave more alike, after it is filled: those without rings change places between waves."""

import numpy as np

from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.pipelines.problem import Flags, Integers, Placement, Ranks, Waves


@compiled
def regroup(ranks: Ranks, waves: Waves, placement: Placement, loads: Integers) -> Integers:
    """Exchange whole micro-batches between ranks of one speed and waves of one kind; ``loads`` afterwards.

    The largest go where rings are largest, the next to the next, so that what is largest in every wave adds up to little.
    ``placement`` is changed with it. Where it would help nobody, nothing changes.
    """
    num_waves, num_ranks = loads.shape
    movable = np.ones(loads.shape, dtype=np.bool_)
    for index in range(placement.wave.size):
        if placement.ring[index] > 1:
            first = placement.first[index]
            movable[placement.wave[index], first : first + placement.ring[index]] = False
    bins, heights = np.arange(loads.size), _heights(movable, loads)
    done = np.zeros(num_waves, dtype=np.bool_)
    for wave in range(num_waves):
        if done[wave]:
            continue
        alike = (waves.room == waves.room[wave]) & (waves.recomputed == waves.recomputed[wave])
        done |= alike
        for rank in range(num_ranks):
            if (ranks.speeds[:rank] == ranks.speeds[rank]).any():
                continue
            _exchange(alike, ranks.speeds == ranks.speeds[rank], movable, heights, loads.ravel(), bins)
    changed = loads.copy().ravel()
    for at in range(bins.size):
        changed[bins[at]] = loads[at // num_ranks, at % num_ranks]
    moved = changed.reshape(loads.shape)
    if _total(moved, ranks) >= _total(loads, ranks):
        return loads
    for index in range(placement.wave.size):
        if placement.ring[index] == 1:
            at = bins[placement.wave[index] * num_ranks + placement.first[index]]
            placement.wave[index], placement.first[index] = at // num_ranks, at % num_ranks
    return moved


@compiled
def _heights(movable: Flags, loads: Integers) -> Integers:
    """What orders the waves: their largest ring, or the mean of what has none, if that is more."""
    heights = np.zeros(loads.shape[0], dtype=np.int64)
    for wave in range(loads.shape[0]):
        count, total = 0, 0
        for rank in range(loads.shape[1]):
            if movable[wave, rank]:
                count, total = count + 1, total + loads[wave, rank]
            else:
                heights[wave] = max(heights[wave], loads[wave, rank])
        heights[wave] = max(heights[wave], total // max(1, count))
    return heights


@compiled
def _exchange(
    of_waves: Flags, of_ranks: Flags, movable: Flags, heights: Integers, loads: Integers, bins: Integers
) -> None:
    """Write into ``bins`` where the micro-batches of some waves and ranks go: the largest to the highest wave."""
    num_ranks = of_ranks.size
    sources = np.empty(bins.size, dtype=np.int64)
    targets = np.empty(bins.size, dtype=np.int64)
    count = 0
    rising = False
    for wave in np.argsort(-heights, kind="mergesort"):
        if not of_waves[wave]:
            continue
        for step in range(num_ranks):  # there and back, so that no rank always gets the larger ones
            rank = num_ranks - 1 - step if rising else step
            if of_ranks[rank] and movable[wave, rank]:
                sources[count] = targets[count] = wave * num_ranks + rank
                count += 1
        rising = not rising
    by_load = np.argsort(-loads[sources[:count]], kind="mergesort")
    for index in range(count):
        bins[sources[by_load[index]]] = targets[index]


@compiled
def _total(loads: Integers, ranks: Ranks) -> float:
    """The largest of every wave, added up."""
    total = 0.0
    for wave in range(loads.shape[0]):
        largest = 0.0
        for rank in range(loads.shape[1]):
            largest = max(largest, loads[wave, rank] / ranks.speeds[rank])
        total += largest
    return total
