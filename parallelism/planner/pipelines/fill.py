"""Fills waves of given sizes with the sequences of a batch: rings side by side, whole sequences into what is left.

A wave holds one micro-batch of every HDP rank. Sequences come longest first. A ring takes neighbouring ranks, in the wave in
which its members together need least time; a whole sequence goes where the fullest of time and tokens stays lowest. It is
LPT on machines of unequal speed (Graham; Gonzalez, Ibarra and Sahni, 1977), with a second resource and with gangs.
"""

import numpy as np

from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.costs import Coefficients
from evermesh.parallelism.planner.pipelines.problem import Batch, Filling, Flags, Integers, Placement, Ranks, Waves
from evermesh.parallelism.planner.pipelines.rings import find_gaps, place_ring, ring_ticks

_MOST_LOOKS = 3_000_000
"""At micro-batches for the one that a sequence fills best."""


@compiled
def fill(
    costs: Coefficients, ranks: Ranks, batch: Batch, waves: Waves, full: int, placement: Placement
) -> tuple[int, Integers]:
    """Place every sequence, writing into ``placement``; ``full`` is the size of most waves, in ticks.

    Returns how many sequences found no room (then nothing else is of use), and [wave, rank] the ticks of what is there.
    """
    filling = _nothing(ranks, waves)
    emptiest = np.zeros(waves.targets.size, dtype=np.int64)
    stale = np.ones(waves.targets.size, dtype=np.bool_)
    roomiest = int(np.argmax(waves.room))
    lost, looks = 0, 0
    for index in range(batch.lengths.size):
        length = batch.lengths[index]
        if length <= waves.room[roomiest] and batch.whole[int(waves.recomputed[roomiest]), index] <= full:
            wave, first, fullness = _place_whole(batch, index, waves, filling, emptiest, stale)
            ring = 1
            if fullness > 1.0 and looks < _MOST_LOOKS:
                looks += filling.loads.size
                wave, first, ring = _place_in_gaps(costs, ranks, batch, index, waves, filling, wave, first)
        else:
            wave, first, ring = place_ring(costs, ranks, length, waves, filling)
        if wave < 0:
            lost += 1
            continue
        if ring == 1:
            needed, heads, gathers = batch.whole[int(waves.recomputed[wave]), index], 1, False
        else:
            needed, heads, gathers = ring_ticks(costs, ranks, length, ring, waves.recomputed[wave])
        placement.wave[index], placement.first[index], placement.ring[index] = wave, first, ring
        placement.heads[index], placement.gathers[index] = heads, gathers
        for rank in range(first, first + ring):
            filling.loads[wave, rank] += needed
            filling.tokens[wave, rank] += (length + ring - 1) // ring
        stale[wave] = True
    return lost, filling.loads


@compiled
def _nothing(ranks: Ranks, waves: Waves) -> Filling:
    """Empty waves."""
    num_waves, num_ranks = waves.targets.size, ranks.nodes.size
    limits = np.empty((num_waves, num_ranks), dtype=np.float64)
    for wave in range(num_waves):
        for rank in range(num_ranks):
            limits[wave, rank] = max(1.0, waves.targets[wave] * ranks.speeds[rank])
    loads = np.zeros((num_waves, num_ranks), dtype=np.int64)
    return Filling(loads, np.zeros_like(loads), limits)


@compiled
def _place_in_gaps(
    costs: Coefficients,
    ranks: Ranks,
    batch: Batch,
    index: int,
    waves: Waves,
    filling: Filling,
    wave: int,
    rank: int,
) -> tuple[int, int, int]:
    """Wave, first rank and ring of a sequence that would make ``wave`` too large: there, if nothing is better."""
    gap_wave, gap_rank = _find_gap(batch, index, waves, filling)
    if gap_wave >= 0:
        return gap_wave, gap_rank, 1
    gap_wave, gap_rank, ring = find_gaps(costs, ranks, batch, index, waves, filling)
    if gap_wave >= 0:
        return gap_wave, gap_rank, ring
    return wave, rank, 1


@compiled
def _find_gap(batch: Batch, index: int, waves: Waves, filling: Filling) -> tuple[int, int]:
    """The rank that a sequence fills best without making its wave larger; -1 if it would everywhere."""
    length, num_ranks = batch.lengths[index], filling.limits.shape[1]
    chosen, chosen_rank, least = -1, 0, np.inf
    for wave in range(waves.targets.size):
        needed = batch.whole[int(waves.recomputed[wave]), index]
        highest = 0.0
        for rank in range(num_ranks):
            highest = max(highest, filling.loads[wave, rank] / filling.limits[wave, rank])
        for rank in range(num_ranks):
            lacking = highest - (filling.loads[wave, rank] + needed) / filling.limits[wave, rank]
            if 0.0 <= lacking < least and filling.tokens[wave, rank] + length <= waves.room[wave]:
                chosen, chosen_rank, least = wave, rank, lacking
    return chosen, chosen_rank


@compiled
def _place_whole(
    batch: Batch,
    index: int,
    waves: Waves,
    filling: Filling,
    emptiest: Integers,
    stale: Flags,
) -> tuple[int, int, float]:
    """The wave and rank whose fullness stays lowest, and how full it is then; -1 when none has room."""
    length, num_ranks = batch.lengths[index], filling.limits.shape[1]
    chosen, chosen_rank, least = -1, 0, np.inf
    for wave in range(waves.targets.size):
        if stale[wave]:
            emptiest[wave], stale[wave] = _emptiest(waves, filling, wave), False
        rank = emptiest[wave]
        if filling.tokens[wave, rank] + length > waves.room[wave]:
            continue
        needed = batch.whole[int(waves.recomputed[wave]), index]
        fullness = (filling.loads[wave, rank] + needed) / filling.limits[wave, rank]
        fullness = max(fullness, (filling.tokens[wave, rank] + length) / waves.room[wave])
        if fullness < least:
            chosen, chosen_rank, least = wave, rank, fullness
    if chosen >= 0 and least <= 1.0:
        return chosen, chosen_rank, least
    for wave in range(waves.targets.size):  # perhaps a rank that is not the emptiest has more room for tokens
        needed = batch.whole[int(waves.recomputed[wave]), index]
        for rank in range(num_ranks):
            if filling.tokens[wave, rank] + length > waves.room[wave]:
                continue
            fullness = (filling.loads[wave, rank] + needed) / filling.limits[wave, rank]
            if fullness < least:
                chosen, chosen_rank, least = wave, rank, fullness
    return chosen, chosen_rank, least


@compiled
def _emptiest(waves: Waves, filling: Filling, wave: int) -> int:
    """The rank whose fullest of time and tokens is lowest."""
    emptiest, lowest = 0, np.inf
    for rank in range(filling.limits.shape[1]):
        fullness = filling.loads[wave, rank] / filling.limits[wave, rank]
        fullness = max(fullness, filling.tokens[wave, rank] / waves.room[wave])
        if fullness < lowest:
            emptiest, lowest = rank, fullness
    return emptiest
