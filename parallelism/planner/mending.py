"""A plan whose ranks were lost or became slow, mended: the rings and whole sequences of all others stay where they are.

A rank that leaves gives its place in every ring to one other rank, whose own rings leave that stretch of time free; the other
members keep their shares. What the other rank had there, and the whole sequences of the rank that left, find room elsewhere.
Ranks have their old numbers throughout.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.costs import Coefficients, gained_together, is_recomputed, shared_s, ticks
from evermesh.parallelism.planner.filling import Filling, Slots, members, slot_ticks
from evermesh.parallelism.planner.rings import Floats, Integers, Rings, ranks_of, scaled
from evermesh.parallelism.planner.sorting import longest_first

Flags = NDArray[np.bool_]


class Packed(NamedTuple):
    """The columns of ``PackedRanks`` that the loops need."""

    rank_start: Integers
    micro_batch_start: Integers
    sequence: Integers
    ring_start: Integers
    ring: Integers
    heads: Integers
    gathers: Flags
    recomputed: Flags


class Found(NamedTuple):
    """A plan as rings and whole sequences."""

    rings: Rings
    """In the order in which they start, their members in ring order."""
    holder: Integers
    """Of every sequence, the rank that holds it whole; -1: a ring does."""
    before: Integers
    """Of every whole sequence, the next ring of its rank; the number of rings behind the last."""
    end: int
    """When the last rank is done, ticks."""


@compiled
def found_in(costs: Coefficients, lengths: Integers, packed: Packed, slowness: Floats, node_of: Integers) -> Found:
    """Rings and whole sequences of a plan, timed on its ranks.

    ``end`` is -1 where the plan is of another kind: a ring beside something else in a micro-batch, or ranks that wait in
    a circle.
    """
    ranks, count = len(slowness), 0
    ring_at = np.full(len(lengths), -1, np.int64)
    for sequence in range(len(lengths)):
        if packed.ring_start[sequence + 1] - packed.ring_start[sequence] > 1:
            ring_at[sequence] = count
            count += 1
    arrived, latest = np.zeros(count, np.int64), np.zeros(count, np.int64)
    order, stop, done = np.empty(count, np.int64), np.empty(count, np.int64), 0
    at, clock = packed.rank_start[:ranks].copy(), np.zeros(ranks, np.int64)
    ready = np.empty(ranks + len(packed.ring), np.int64)
    ready[:ranks], waiting = np.arange(ranks)[::-1], ranks
    while waiting:
        waiting -= 1
        rank = ready[waiting]
        while at[rank] < packed.rank_start[rank + 1]:
            first, last = packed.micro_batch_start[at[rank]], packed.micro_batch_start[at[rank] + 1]
            sequence = packed.sequence[first] if last > first else 0
            ring = ring_at[sequence] if last > first else -1
            if ring < 0:
                total = ticks(costs, costs.micro_batch_s)
                for piece in range(first, last):
                    if ring_at[packed.sequence[piece]] >= 0:
                        return _of_another_kind(arrived)
                    length = lengths[packed.sequence[piece]]
                    total += ticks(costs, shared_s(costs, length, 1, 1, False, False, packed.recomputed[at[rank]]))
                if packed.recomputed[at[rank]] and costs.offloads:
                    total -= gained_together(costs, lengths[packed.sequence[first:last]])
                clock[rank] += scaled(total, slowness[rank])
                at[rank] += 1
                continue
            if last - first > 1:
                return _of_another_kind(arrived)
            ring_members = packed.ring[packed.ring_start[sequence] : packed.ring_start[sequence + 1]]
            arrived[ring] += 1
            latest[ring] = max(latest[ring], clock[rank])
            if arrived[ring] < len(ring_members):
                break
            duration = _duration(
                costs, lengths[sequence], ring_members, packed.heads[sequence], packed.gathers[sequence], node_of
            )
            stop[ring] = latest[ring] + scaled(duration, slowness[ring_members].max())
            order[done] = sequence
            done += 1
            for member in ring_members:
                clock[member] = stop[ring]
                at[member] += 1
                ready[waiting] = member
                waiting += 1
            break
    if done < count:
        return _of_another_kind(arrived)
    # stable, so that rings that start at once keep an order that all their members agree on
    order = order[np.argsort(latest[ring_at[order]], kind="mergesort")]
    rings = _rings_of(packed, order, latest[ring_at[order]], stop[ring_at[order]])
    ring_at[order] = np.arange(count)
    holder, before = _whole_of(lengths, packed, ring_at)
    return Found(rings, holder, before, int(clock.max()))


@compiled
def _of_another_kind(none: Integers) -> Found:
    none = none[:0]
    return Found(Rings(none, none, none, none, none, none), none, none, -1)


@compiled
def _rings_of(packed: Packed, order: Integers, start: Integers, stop: Integers) -> Rings:
    """The rings of the sequences in ``order``, their members in ring order."""
    count = len(order)
    sizes, firsts = np.empty(count, np.int64), np.empty(count, np.int64)
    total = 0
    for ring in range(count):
        sizes[ring] = packed.ring_start[order[ring] + 1] - packed.ring_start[order[ring]]
        firsts[ring] = total
        total += sizes[ring]
    member = np.empty(total, np.int64)
    for ring in range(count):
        begin = packed.ring_start[order[ring]]
        member[firsts[ring] : firsts[ring] + sizes[ring]] = packed.ring[begin : begin + sizes[ring]]
    return Rings(order, member, firsts, sizes, start, stop)


@compiled
def _whole_of(lengths: Integers, packed: Packed, ring_at: Integers) -> tuple[Integers, Integers]:
    """Holder and next ring of every whole sequence."""
    holder, before = np.full(len(lengths), -1, np.int64), np.full(len(lengths), -1, np.int64)
    for rank in range(len(packed.rank_start) - 1):
        following = int(ring_at.max()) + 1
        for micro_batch in range(packed.rank_start[rank + 1] - 1, packed.rank_start[rank] - 1, -1):
            for piece in range(packed.micro_batch_start[micro_batch], packed.micro_batch_start[micro_batch + 1]):
                sequence = packed.sequence[piece]
                if ring_at[sequence] >= 0:
                    following = ring_at[sequence]
                else:
                    holder[sequence], before[sequence] = rank, following
    return holder, before


@compiled
def _duration(
    costs: Coefficients, length: int, ring_members: Integers, heads: int, gathers: bool, node_of: Integers
) -> int:
    """A ring on ranks of nominal speed, ticks."""
    size, nodes = len(ring_members), node_of[ring_members]
    again = is_recomputed(costs, (length + size - 1) // size)
    seconds = shared_s(costs, length, size, heads, gathers, nodes.min() != nodes.max(), again)
    return ticks(costs, seconds + costs.micro_batch_s)


@compiled
def durations_of(
    costs: Coefficients, lengths: Integers, rings: Rings, heads: Integers, gathers: Flags, node_of: Integers
) -> Integers:
    """Of every ring on ranks of nominal speed, ticks. Heads are divided no more where a new member is in another node."""
    durations = np.empty(len(rings.first), np.int64)
    for ring in range(len(rings.first)):
        sequence, ring_members = rings.sequence[ring], ranks_of(rings, ring)
        nodes = node_of[ring_members]
        for position in range(len(nodes)):
            if nodes[position] != nodes[position - position % heads[sequence]]:
                heads[sequence], gathers[sequence] = 1, False
        durations[ring] = _duration(costs, lengths[sequence], ring_members, heads[sequence], gathers[sequence], node_of)
    return durations


@compiled
def by_start(found: Found) -> Found:
    """The rings in the order in which they start; of those that start at once, as they were."""
    rings, count = found.rings, len(found.rings.first)
    order = np.argsort(rings.start, kind="mergesort")
    member, first, at = np.empty_like(rings.member), np.empty(count, np.int64), 0
    place = np.empty(count + 1, np.int64)
    place[count] = count
    for k in range(count):
        size = rings.size[order[k]]
        first[k], place[order[k]] = at, k
        member[at : at + size] = ranks_of(rings, order[k])
        at += size
    ordered = Rings(rings.sequence[order], member, first, rings.size[order], rings.start[order], rings.stop[order])
    before = found.before.copy()
    for sequence in range(len(before)):
        if before[sequence] >= 0:
            before[sequence] = place[before[sequence]]
    return Found(ordered, found.holder, before, found.end)


@compiled
def retime(rings: Rings, durations: Integers, slowness: Floats) -> Integers:
    """Let rings start where they did, or when their members are free; returns when every rank is free after them."""
    free = np.zeros(len(slowness), np.int64)
    for ring in range(len(rings.first)):
        ring_members = ranks_of(rings, ring)
        rings.start[ring] = max(rings.start[ring], free[ring_members].max())
        rings.stop[ring] = rings.start[ring] + scaled(durations[ring], slowness[ring_members].max())
        free[ring_members] = rings.stop[ring]
    return free


@compiled
def keep(
    slots: Slots,
    rings: int,
    lengths: Integers,
    holder: Integers,
    before: Integers,
    alone: Integers,
    slowness: Floats,
    pack: int,
    fixed: int,
) -> tuple[Filling, Integers, Flags]:
    """Leave whole sequences where they are, as far as there is room.

    Returns:
        The filling, the ticks that are left in every slot, and which whole sequences have no place: those of no rank, and
        the longest of those that have too little room on theirs.
    """
    count = len(slots.rank)
    filling = Filling(np.full(count, -1, np.int64), np.full(len(lengths), -1, np.int64))
    loose = np.zeros(len(lengths), np.bool_)
    key = slots.rank * (rings + 1) + slots.before
    by_key = np.argsort(key)
    keys = key[by_key]
    for sequence in range(len(lengths)):
        if before[sequence] < 0:
            continue
        wanted = holder[sequence] * (rings + 1) + before[sequence]
        at = np.searchsorted(keys, wanted)
        if holder[sequence] < 0 or at == count or keys[at] != wanted:
            loose[sequence] = True
            continue
        slot = by_key[at]
        filling.next[sequence] = filling.head[slot]
        filling.head[slot] = sequence
    room = slots.room.copy()
    for slot in range(count):
        room[slot] -= _relieve(filling, loose, slot, slots, lengths, alone, slowness, pack, fixed)
    for sequence in longest_first(lengths):
        if not loose[sequence] or holder[sequence] < 0:
            continue
        rank = holder[sequence]
        best = rank
        for at in range(np.searchsorted(keys, rank * (rings + 1)), np.searchsorted(keys, (rank + 1) * (rings + 1))):
            if room[by_key[at]] > room[best]:
                best = by_key[at]
        cost = scaled(alone[sequence] + fixed, slowness[rank])
        if cost <= room[best]:
            loose[sequence] = False
            room[best] -= cost
            filling.next[sequence] = filling.head[best]
            filling.head[best] = sequence
    return filling, room, loose


@compiled
def _relieve(
    filling: Filling,
    loose: Flags,
    slot: int,
    slots: Slots,
    lengths: Integers,
    alone: Integers,
    slowness: Floats,
    pack: int,
    fixed: int,
) -> int:
    """Take sequences out of a slot, the shortest that is enough or the longest, until the others fit; returns their ticks."""
    slow = slowness[slots.rank[slot]]
    mine = members(filling, lengths, slot)
    used = slot_ticks(lengths, mine, alone, slow, pack, fixed)
    if used <= slots.room[slot]:
        return used
    while len(mine) and used > slots.room[slot]:
        out = 0
        while out + 1 < len(mine) and used - scaled(alone[mine[out + 1]], slow) <= slots.room[slot]:
            out += 1
        loose[mine[out]] = True
        mine = np.concatenate((mine[:out], mine[out + 1 :]))
        used = slot_ticks(lengths, mine, alone, slow, pack, fixed)
    filling.head[slot] = -1
    for sequence in mine:
        filling.next[sequence] = filling.head[slot]
        filling.head[slot] = sequence
    return used
