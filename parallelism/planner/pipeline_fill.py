"""Fills waves of given sizes with the sequences of a batch: rings side by side, whole sequences into what is left.

A wave holds one micro-batch of every HDP rank. Sequences come longest first. A ring takes neighbouring ranks, in the wave in
which its members together need least time; a whole sequence goes where the fullest of time and tokens stays lowest. It is
LPT on machines of unequal speed (Graham; Gonzalez, Ibarra and Sahni, 1977), with a second resource and with gangs.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.costs import Coefficients, best_sharing, ticks
from evermesh.parallelism.planner.pipeline_replay import Integers

_MOST_AREA = 1.25
"""Rings wider than the one with the least time of all members together may take so much more of it."""
_WIDEST_GAP = 6
"""Ranks that share a sequence which one could hold, because nobody has time for it alone."""
_MOST_LOOKS = 3_000_000
"""At micro-batches for the one that a sequence fills best."""

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class Batch(NamedTuple):
    """What is to be placed, longest sequence first."""

    lengths: Integers
    whole: Integers
    """[recomputed, sequence]: ticks on one rank."""


class Ranks(NamedTuple):
    """Where it can be placed."""

    nodes: Integers
    """Of every HDP rank."""
    speeds: Floats
    node_size: int
    """Ranks of the smallest node: rings up to that size stay in one."""
    aligned: bool
    """Whether all nodes have that size; otherwise wider rings never divide heads."""


class Waves(NamedTuple):
    """How large every wave is meant to be."""

    targets: Integers
    """Ticks of a micro-batch on a rank of speed 1, without its fixed cost."""
    room: Integers
    """Tokens of a micro-batch."""
    recomputed: Flags


class Placement(NamedTuple):
    """Where every sequence of a ``Batch`` is; [sequence]."""

    wave: Integers
    first: Integers
    """The first rank of its ring."""
    ring: Integers
    heads: Integers
    gathers: Flags


@compiled
def ring_ticks(costs: Coefficients, ranks: Ranks, length: int, ring: int, recomputed: bool) -> tuple[int, int, bool]:
    """Ticks of a member of the cheapest sharing of a ring of that size; its heads and whether it gathers."""
    crosses = ring > ranks.node_size
    neighbours = ranks.node_size if ranks.aligned or not crosses else 1
    seconds, heads, gathers = best_sharing(costs, length, ring, neighbours, crosses, recomputed)
    return ticks(costs, seconds), heads, gathers


@compiled
def choose_ring(
    costs: Coefficients, ranks: Ranks, length: int, room: int, recomputed: bool, target: int
) -> tuple[int, int]:
    """The smallest ring within the target and its ticks, else the fastest among those that take little more area.

    Area is the ticks of all members together; 0 and 0 when no ring has room.
    """
    num_ranks = ranks.nodes.size
    fastest, fewest, least_area = 0, 0, 0
    for ring in range((length + room - 1) // room, min(num_ranks, length) + 1):
        needed, _, _ = ring_ticks(costs, ranks, length, ring, recomputed)
        area = needed * ring
        if fastest == 0 or area < least_area:
            least_area = area
        if area > _MOST_AREA * least_area:
            if ring > ranks.node_size:
                break
            continue
        if fastest == 0 or needed < fewest:
            fastest, fewest = ring, needed
        if needed <= target:
            break
    return fastest, fewest


@compiled
def demand(costs: Coefficients, ranks: Ranks, batch: Batch, room: int, recomputed: bool, target: int) -> tuple[Integers, Integers]:
    """The ring of every sequence for waves of ``target`` ticks, and the ticks of its members."""
    count = batch.lengths.size
    rings, needed = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for index in range(count):
        if index > 0 and batch.lengths[index] == batch.lengths[index - 1]:
            rings[index], needed[index] = rings[index - 1], needed[index - 1]
        elif batch.lengths[index] <= room and batch.whole[int(recomputed), index] <= target:
            rings[index], needed[index] = 1, batch.whole[int(recomputed), index]
        else:
            rings[index], needed[index] = choose_ring(costs, ranks, batch.lengths[index], room, recomputed, target)
    return rings, needed


@compiled
def fill(
    costs: Coefficients, ranks: Ranks, batch: Batch, waves: Waves, full: int, placement: Placement
) -> tuple[int, Integers]:
    """Place every sequence, writing into ``placement``; ``full`` is the size of most waves, in ticks.

    Returns how many sequences found no room (then nothing else is of use), and [wave, rank] the ticks of what is there.
    """
    num_waves, num_ranks = waves.targets.size, ranks.nodes.size
    loads = np.zeros((num_waves, num_ranks), dtype=np.int64)
    tokens = np.zeros((num_waves, num_ranks), dtype=np.int64)
    limits = np.empty((num_waves, num_ranks), dtype=np.float64)
    for wave in range(num_waves):
        for rank in range(num_ranks):
            limits[wave, rank] = max(1.0, waves.targets[wave] * ranks.speeds[rank])
    emptiest = np.zeros(num_waves, dtype=np.int64)
    stale = np.ones(num_waves, dtype=np.bool_)
    roomiest, lost = int(np.argmax(waves.room)), 0
    looks = 0
    for index in range(batch.lengths.size):
        length = batch.lengths[index]
        wave, first, ring = -1, 0, 1
        if length <= waves.room[roomiest] and batch.whole[int(waves.recomputed[roomiest]), index] <= full:
            wave, first, fullness = _place_whole(batch, index, waves, limits, loads, tokens, emptiest, stale)
            if fullness > 1.0 and looks < _MOST_LOOKS:
                looks += loads.size
                gap_wave, gap_rank = _find_gap(batch, index, waves, limits, loads, tokens)
                if gap_wave >= 0:
                    wave, first = gap_wave, gap_rank
                else:
                    gap_wave, gap_rank, wider = _find_gaps(costs, ranks, batch, index, waves, limits, loads, tokens)
                    if gap_wave >= 0:
                        wave, first, ring = gap_wave, gap_rank, wider
        else:
            wave, first, ring = _place_ring(costs, ranks, length, waves, limits, loads, tokens)
        if wave < 0:
            lost += 1
            continue
        if ring == 1:
            needed, heads, gathers = batch.whole[int(waves.recomputed[wave]), index], 1, False
        else:
            needed, heads, gathers = ring_ticks(costs, ranks, length, ring, waves.recomputed[wave])
        placement.wave[index], placement.first[index], placement.ring[index] = wave, first, ring
        placement.heads[index], placement.gathers[index] = heads, gathers
        share = (length + ring - 1) // ring
        for rank in range(first, first + ring):
            loads[wave, rank] += needed
            tokens[wave, rank] += share
        stale[wave] = True
    return lost, loads


@compiled
def _find_gap(
    batch: Batch, index: int, waves: Waves, limits: Floats, loads: Integers, tokens: Integers
) -> tuple[int, int]:
    """The rank that a sequence fills best without making its wave larger; -1 if it would everywhere."""
    length, num_ranks = batch.lengths[index], limits.shape[1]
    chosen, chosen_rank, least = -1, 0, np.inf
    for wave in range(waves.targets.size):
        needed = batch.whole[int(waves.recomputed[wave]), index]
        highest = 0.0
        for rank in range(num_ranks):
            highest = max(highest, loads[wave, rank] / limits[wave, rank])
        for rank in range(num_ranks):
            lacking = highest - (loads[wave, rank] + needed) / limits[wave, rank]
            if 0.0 <= lacking < least and tokens[wave, rank] + length <= waves.room[wave]:
                chosen, chosen_rank, least = wave, rank, lacking
    return chosen, chosen_rank


@compiled
def _find_gaps(
    costs: Coefficients,
    ranks: Ranks,
    batch: Batch,
    index: int,
    waves: Waves,
    limits: Floats,
    loads: Integers,
    tokens: Integers,
) -> tuple[int, int, int]:
    """Neighbours that have room for a sequence together, which none of them has alone: wave, first and number; -1 if none."""
    length = batch.lengths[index]
    for ring in range(2, min(_WIDEST_GAP, ranks.nodes.size, length) + 1):
        for wave in range(waves.targets.size):
            recomputed = waves.recomputed[wave]
            needed, _, _ = ring_ticks(costs, ranks, length, ring, recomputed)
            if needed * ring > _MOST_AREA * batch.whole[int(recomputed), index] or needed > waves.targets[wave]:
                continue
            first, _ = _find_start(ranks, length, ring, needed, wave, waves, limits, loads, tokens, 1.0)
            if first >= 0:
                return wave, first, ring
    return -1, 0, 0


@compiled
def _place_whole(
    batch: Batch,
    index: int,
    waves: Waves,
    limits: Floats,
    loads: Integers,
    tokens: Integers,
    emptiest: Integers,
    stale: Flags,
) -> tuple[int, int, float]:
    """The wave and rank whose fullness stays lowest, and how full it is then; -1 when none has room."""
    length, num_ranks = batch.lengths[index], limits.shape[1]
    chosen, chosen_rank, least = -1, 0, np.inf
    for wave in range(waves.targets.size):
        if stale[wave]:
            lowest = np.inf
            for rank in range(num_ranks):
                fullness = max(loads[wave, rank] / limits[wave, rank], tokens[wave, rank] / waves.room[wave])
                if fullness < lowest:
                    lowest, emptiest[wave] = fullness, rank
            stale[wave] = False
        rank = emptiest[wave]
        if tokens[wave, rank] + length > waves.room[wave]:
            continue
        needed = batch.whole[int(waves.recomputed[wave]), index]
        fullness = max(
            (loads[wave, rank] + needed) / limits[wave, rank], (tokens[wave, rank] + length) / waves.room[wave]
        )
        if fullness < least:
            chosen, chosen_rank, least = wave, rank, fullness
    if chosen >= 0 and least <= 1.0:
        return chosen, chosen_rank, least
    for wave in range(waves.targets.size):  # perhaps a rank that is not the emptiest has more room for tokens
        needed = batch.whole[int(waves.recomputed[wave]), index]
        for rank in range(num_ranks):
            if tokens[wave, rank] + length > waves.room[wave]:
                continue
            fullness = (loads[wave, rank] + needed) / limits[wave, rank]
            if fullness < least:
                chosen, chosen_rank, least = wave, rank, fullness
    return chosen, chosen_rank, least


@compiled
def _place_ring(
    costs: Coefficients, ranks: Ranks, length: int, waves: Waves, limits: Floats, loads: Integers, tokens: Integers
) -> tuple[int, int, int]:
    """The wave, first rank and size of a ring; -1 when no wave has room for it.

    Of the waves with room in time and tokens that in which the members together need least; if there is none, the wave
    whose fullest member stays emptiest.
    """
    num_waves = waves.targets.size
    sizes, needed = np.zeros(num_waves, dtype=np.int64), np.zeros(num_waves, dtype=np.int64)
    for wave in range(num_waves):
        known = -1
        for other in range(max(0, wave - 1), wave):
            if waves.targets[other] == waves.targets[wave] and waves.recomputed[other] == waves.recomputed[wave]:
                known = other
        if known >= 0:
            sizes[wave], needed[wave] = sizes[known], needed[known]
        else:
            sizes[wave], needed[wave] = choose_ring(
                costs, ranks, length, waves.room[wave], waves.recomputed[wave], waves.targets[wave]
            )
    chosen, chosen_first, least_area = -1, 0, 0
    for wave in range(num_waves):
        area = sizes[wave] * needed[wave]
        if sizes[wave] == 0 or needed[wave] > waves.targets[wave] or (chosen >= 0 and area >= least_area):
            continue
        first, _ = _find_start(ranks, length, sizes[wave], needed[wave], wave, waves, limits, loads, tokens, 1.0)
        if first >= 0:
            chosen, chosen_first, least_area = wave, first, area
    if chosen >= 0:
        return chosen, chosen_first, sizes[chosen]
    least = np.inf
    for wave in range(num_waves):
        if sizes[wave] > 0:
            first, fullness = _find_start(
                ranks, length, sizes[wave], needed[wave], wave, waves, limits, loads, tokens, least
            )
            if first >= 0 and fullness < least:
                chosen, chosen_first, least = wave, first, fullness
    return chosen, chosen_first, sizes[max(chosen, 0)]


@compiled
def _find_start(
    ranks: Ranks,
    length: int,
    ring: int,
    needed: int,
    wave: int,
    waves: Waves,
    limits: Floats,
    loads: Integers,
    tokens: Integers,
    most: float,
) -> tuple[int, float]:
    """The first run of ranks on which a ring leaves all within ``most`` of their limits, and how full; -1 if none does.

    With ``most`` above 1, the emptiest such run.
    """
    num_ranks, share = ranks.nodes.size, (length + ring - 1) // ring
    crosses = ring > ranks.node_size
    found, least = -1, most
    first = 0
    while first + ring <= num_ranks:
        if not crosses and ring > 1 and ranks.nodes[first] != ranks.nodes[first + ring - 1]:
            first += 1
            continue
        if crosses and ranks.aligned and ranks.node_size > 1 and first % ranks.node_size:
            first += 1
            continue
        fullest, blocked = 0.0, -1
        for rank in range(first + ring - 1, first - 1, -1):
            fullness = (loads[wave, rank] + needed) / limits[wave, rank]
            fullest = max(fullest, fullness)
            if tokens[wave, rank] + share > waves.room[wave] or fullest > least:
                blocked = rank
                break
        if blocked >= 0:
            first = blocked + 1
            continue
        found, least = first, fullest
        if most <= 1.0:
            break
        first += 1
    return found, least
