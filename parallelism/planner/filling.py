"""Whole sequences onto ranks: into the gaps before rings, and behind the last one, so that all ranks end together.

Three steps: the longest sequence first to the rank with the most time left (worst fit, which for a common end is Graham's
LPT rule, SIAM J. Appl. Math. 1969); exchanges of sequences between the rank that ends last and others; packs of at most a
micro-batch's tokens by first fit decreasing (Johnson et al., SIAM J. Comput. 1974).
"""

from typing import NamedTuple

import numpy as np

from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.rings import FOREVER, Floats, Integers, Rings, ranks_of, scaled

_PARTNERS = 6
"""Ranks that end early with which the rank that ends last tries to exchange sequences."""


class Slots(NamedTuple):
    """Stretches of time of a rank that whole sequences can fill. Slot r is what comes behind the last ring of rank r."""

    rank: Integers
    before: Integers
    """The ring that a gap comes before; the number of rings for what comes behind the last."""
    room: Integers
    """Ticks until the ring, or until the target, which may be passed."""


class Filling(NamedTuple):
    """Which slot every sequence is in, as lists: ``head[slot]``, then ``next[sequence]`` until -1."""

    head: Integers
    next: Integers


@compiled
def slots_between(rings: Rings, load: Integers, target: int) -> Slots:
    """The slots that ``rings`` leave, ``load`` being when every rank is free after them."""
    ranks, count = len(load), len(rings.first)
    free = np.zeros(ranks, np.int64)
    gaps = 0
    for ring in range(count):
        for rank in ranks_of(rings, ring):
            gaps += rings.start[ring] > free[rank]
            free[rank] = rings.stop[ring]
    slots = Slots(np.empty(ranks + gaps, np.int64), np.empty(ranks + gaps, np.int64), np.empty(ranks + gaps, np.int64))
    slots.rank[:ranks] = np.arange(ranks)
    slots.before[:ranks] = count
    slots.room[:ranks] = target - load
    free[:] = 0
    slot = ranks
    for ring in range(count):
        for rank in ranks_of(rings, ring):
            if rings.start[ring] > free[rank]:
                slots.rank[slot], slots.before[slot] = rank, ring
                slots.room[slot] = rings.start[ring] - free[rank]
                slot += 1
            free[rank] = rings.stop[ring]
    return slots


@compiled
def fill(
    slots: Slots, lengths: Integers, whole: Integers, alone: Integers, slowness: Floats, pack: int, fixed: int
) -> Filling:
    """Give every sequence of ``whole`` (longest first) to the slot with the most room; a gap never gets more than it holds.

    ``alone`` is the time of every sequence without its micro-batch, which takes ``fixed`` and holds ``pack`` tokens.
    """
    filling = Filling(np.full(len(slots.rank), -1, np.int64), np.full(len(lengths), -1, np.int64))
    ranks, leaves = len(slowness), 1
    while leaves < len(slots.room):
        leaves *= 2
    left = np.full(leaves, -FOREVER)
    left[: len(slots.room)] = slots.room
    open_tokens = np.zeros(leaves, np.int64)
    slot, matches = _tournament(left)
    for sequence in whole:
        while True:
            opens = lengths[sequence] > open_tokens[slot]
            cost = scaled(alone[sequence] + (fixed if opens else 0), slowness[slots.rank[slot]])
            if slot < ranks or cost <= left[slot]:
                break
            # the largest room is a gap too small for this sequence; what is shorter finds room enough elsewhere
            left[slot] = -FOREVER
            slot = _played(matches, slot, -FOREVER)
        open_tokens[slot] = (
            max(open_tokens[slot], pack - lengths[sequence]) if opens else open_tokens[slot] - lengths[sequence]
        )
        filling.next[sequence] = filling.head[slot]
        filling.head[slot] = sequence
        left[slot] -= cost
        slot = _played(matches, slot, left[slot])
    return filling


class _Matches(NamedTuple):
    """Who lost every match but the first, which there is none of, and with how much room: side by side, for speed."""

    loser: Integers
    room: Integers


@compiled
def _tournament(room: Integers) -> tuple[int, _Matches]:
    """The slot with the largest room, of equals the first, and who lost every other match (Knuth, TAOCP 3, 5.4.1)."""
    leaves = len(room)
    winners, matches = np.arange(-leaves, leaves), _Matches(np.zeros(leaves, np.int64), np.zeros(leaves, np.int64))
    for match in range(leaves - 1, 0, -1):
        one, other = winners[2 * match], winners[2 * match + 1]
        winners[match], matches.loser[match] = (one, other) if room[one] >= room[other] else (other, one)
        matches.room[match] = room[matches.loser[match]]
    return winners[1], matches


@compiled
def _played(matches: _Matches, slot: int, room: int) -> int:
    """The winner after the last one, ``slot``, has only so much ``room`` left: its own matches are played again.

    Without branches, since nobody can predict who wins.
    """
    match = (len(matches.loser) + slot) >> 1
    while match:
        other, other_room = matches.loser[match], matches.room[match]
        wins = (other_room > room) | ((other_room == room) & (other < slot))
        matches.loser[match], matches.room[match] = (slot, room) if wins else (other, other_room)
        slot, room = (other, other_room) if wins else (slot, room)
        match >>= 1
    return slot


@compiled
def members(filling: Filling, lengths: Integers, slot: int) -> Integers:
    """The sequences in a slot, longest first, of equals the first."""
    count, sequence = 0, filling.head[slot]
    while sequence >= 0:
        count += 1
        sequence = filling.next[sequence]
    found = np.empty(count, np.int64)
    sequence = filling.head[slot]
    # the last one that was put in comes first in the list, and is nearly always the shortest
    for place in range(count - 1, -1, -1):
        found[place] = sequence
        sequence = filling.next[sequence]
    for k in range(1, count):
        sequence, at = found[k], k
        while at > 0 and (
            lengths[found[at - 1]] < lengths[sequence]
            or (lengths[found[at - 1]] == lengths[sequence] and found[at - 1] > sequence)
        ):
            found[at] = found[at - 1]
            at -= 1
        found[at] = sequence
    return found


@compiled
def packs_of(lengths: Integers, sequences: Integers, pack: int) -> tuple[Integers, int]:
    """The micro-batch of every sequence by first fit, and their number; one that is longer than ``pack`` is alone."""
    room, chosen, count = np.empty(len(sequences), np.int64), np.empty(len(sequences), np.int64), 0
    for k in range(len(sequences)):
        length = lengths[sequences[k]]
        at = 0
        while at < count and room[at] < length:
            at += 1
        if at == count:
            room[at] = pack
            count += 1
        room[at] -= length
        chosen[k] = at
    return chosen, count


@compiled
def slot_ticks(lengths: Integers, sequences: Integers, alone: Integers, slowness: float, pack: int, fixed: int) -> int:
    """What the sequences of a slot take, packed."""
    total = packs_of(lengths, sequences, pack)[1] * fixed
    for sequence in sequences:
        total += alone[sequence]
    return scaled(total, slowness)


@compiled
def level(
    filling: Filling,
    load: Integers,
    lengths: Integers,
    alone: Integers,
    slowness: Floats,
    pack: int,
    fixed: int,
    goal: int,
    budget: int,
) -> int:
    """Exchange sequences between the rank that ends last and ranks that end early until all end by ``goal``.

    Stops too when no exchange helps the last rank, or after about ``budget`` comparisons. Returns when the last rank ends.
    """
    ranks = len(load)
    ends = load.copy()
    held = [members(filling, lengths, rank) for rank in range(ranks)]
    for rank in range(ranks):
        ends[rank] += slot_ticks(lengths, held[rank], alone, slowness[rank], pack, fixed)
    while budget > 0:
        last = int(np.argmax(ends))
        if ends[last] <= goal:
            break
        mine = held[last]
        helped = False
        partner, end = -1, -1
        for _ in range(min(_PARTNERS, ranks - 1)):
            partner, end = _next_early(ends, last, partner, end)
            theirs = held[partner]
            budget -= ranks // 4 + len(mine) + len(theirs)
            give, take = exchange(mine, theirs, alone, ends[last], ends[partner], slowness[last], slowness[partner])
            if give < 0:
                continue
            new_mine, new_theirs = _exchanged(mine, theirs, give, take, lengths)
            own = load[last] + slot_ticks(lengths, new_mine, alone, slowness[last], pack, fixed)
            other = load[partner] + slot_ticks(lengths, new_theirs, alone, slowness[partner], pack, fixed)
            if max(own, other) < ends[last]:
                held[last], held[partner] = new_mine, new_theirs
                ends[last], ends[partner] = own, other
                helped = True
                break
        if not helped:
            break
    for rank in range(ranks):
        put(filling, rank, held[rank])
    return int(ends.max())


@compiled
def _next_early(ends: Integers, last: int, before: int, end: int) -> tuple[int, int]:
    """The rank behind rank ``before``, which ends at ``end``, in the order of ends, of equals the first; not ``last``."""
    found, least = -1, FOREVER
    for rank in range(len(ends)):
        at = int(ends[rank])
        if at < least and rank != last and (at > end or (at == end and rank > before)):
            found, least = rank, at
    return found, least


@compiled
def exchange(
    mine: Integers, theirs: Integers, alone: Integers, end: int, other: int, slow: float, other_slow: float
) -> tuple[int, int]:
    """Positions of what to give and what to take for it (-1: nothing) so that both end early; (-1, -1): nothing helps.

    Both lists are longest first. Taking a shorter sequence lets the giver end earlier and the other later, and the shorter
    what is given, the shorter is what these two ends meet at: one pass over both lists finds the best pair.
    """
    best, give, take = end, -1, -1
    meet, count, taken = 0, len(theirs), alone[theirs]
    for i in range(len(mine)):
        given = alone[mine[i]]
        mine_left, theirs_more = end - scaled(given, slow), other + scaled(given, other_slow)
        if max(mine_left, theirs_more) < best:
            best, give, take = max(mine_left, theirs_more), i, -1
        while meet < count and mine_left + scaled(taken[meet], slow) > theirs_more - scaled(taken[meet], other_slow):
            meet += 1
        for j in range(max(meet - 1, 0), min(meet + 1, count)):
            later = max(mine_left + scaled(taken[j], slow), theirs_more - scaled(taken[j], other_slow))
            if later < best:
                best, give, take = later, i, j
    return give, take


@compiled
def _exchanged(mine: Integers, theirs: Integers, give: int, take: int, lengths: Integers) -> tuple[Integers, Integers]:
    """Both lists after the exchange, longest first."""
    given = mine[give]
    new_mine = np.concatenate((mine[:give], mine[give + 1 :]))
    if take < 0:
        return new_mine, inserted(theirs, given, lengths)
    taken = theirs[take]
    return inserted(new_mine, taken, lengths), inserted(
        np.concatenate((theirs[:take], theirs[take + 1 :])), given, lengths
    )


@compiled
def inserted(sequences: Integers, sequence: int, lengths: Integers) -> Integers:
    """The sequences of a slot, longest first, with one more."""
    at = 0
    while at < len(sequences) and (
        lengths[sequences[at]] > lengths[sequence]
        or (lengths[sequences[at]] == lengths[sequence] and sequences[at] < sequence)
    ):
        at += 1
    result = np.empty(len(sequences) + 1, np.int64)
    result[:at], result[at], result[at + 1 :] = sequences[:at], sequence, sequences[at:]
    return result


@compiled
def put(filling: Filling, slot: int, sequences: Integers) -> None:
    """Let a slot hold these sequences."""
    filling.head[slot] = -1
    for sequence in sequences:
        filling.next[sequence] = filling.head[slot]
        filling.head[slot] = sequence
