"""Whole sequences that lost their place find another, and few others move for it.

Most ranks end a little before the goal and hold nothing that could leave; few hold many short sequences. So a sequence that
is longer than anybody's time left takes the place of short ones, which then find room in what is left to all others: an
ejection chain of one step (Glover, Discrete Applied Mathematics 1996) instead of exchanges between two ranks.
"""

import numpy as np

from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.filling import Filling, Slots, inserted, members, put, slot_ticks
from evermesh.parallelism.planner.mending import Flags
from evermesh.parallelism.planner.rings import FOREVER, Floats, Integers, scaled
from evermesh.parallelism.planner.sorting import longest_first


@compiled
def make_room(
    filling: Filling,
    slots: Slots,
    room: Integers,
    lengths: Integers,
    loose: Flags,
    alone: Integers,
    slowness: Floats,
    pack: int,
    fixed: int,
) -> None:
    """Give all ``loose`` sequences a place, the longest first: where most time is left, or else in place of shorter ones.

    ``room`` is what the sequences in every slot leave of it, and is used up. A slot ends later than it should only where no
    slot holds enough that others have time for. Then none of ``loose`` is left.
    """
    for sequence in longest_first(lengths):
        if not loose[sequence]:
            continue
        slot = int(np.argmax(room))
        most = room[slot]
        if scaled(alone[sequence] + fixed, slowness[slots.rank[slot]]) > most:
            holder = _holder_of_short(filling, room, lengths, sequence, alone, slowness, fixed, most)
            if holder >= 0:
                slot = holder
                _eject(filling, slots, slot, lengths, sequence, loose, alone, slowness, pack, fixed, most)
            else:
                slot = int(np.argmax(room[: len(slowness)]))  # a gap before a ring cannot be passed
        mine = inserted(members(filling, lengths, slot), sequence, lengths)
        put(filling, slot, mine)
        loose[sequence] = False
        room[slot] = slots.room[slot] - slot_ticks(lengths, mine, alone, slowness[slots.rank[slot]], pack, fixed)


@compiled
def _may_leave(lengths: Integers, member: int, sequence: int, alone: Integers, fixed: int, most: int) -> bool:
    """Whether ``member`` is placed after ``sequence``, and fits where most time is left."""
    if lengths[member] > lengths[sequence] or (lengths[member] == lengths[sequence] and member < sequence):
        return False
    return bool(alone[member] + fixed <= most)


@compiled
def _holder_of_short(
    filling: Filling,
    room: Integers,
    lengths: Integers,
    sequence: int,
    alone: Integers,
    slowness: Floats,
    fixed: int,
    most: int,
) -> int:
    """The rank with most time left of those with enough short sequences to make room for one; -1: there is none."""
    best, best_room = -1, -FOREVER
    for rank in range(len(slowness)):
        if filling.head[rank] < 0 or room[rank] <= best_room:
            continue
        slow = slowness[rank]
        missing = scaled(alone[sequence] + fixed, slow) - room[rank]
        member = filling.head[rank]
        while member >= 0 and missing > 0:
            if _may_leave(lengths, member, sequence, alone, fixed, most):
                missing -= scaled(alone[member], slow)
            member = filling.next[member]
        if missing <= 0:
            best, best_room = rank, room[rank]
    return best


@compiled
def _eject(
    filling: Filling,
    slots: Slots,
    slot: int,
    lengths: Integers,
    sequence: int,
    loose: Flags,
    alone: Integers,
    slowness: Floats,
    pack: int,
    fixed: int,
    most: int,
) -> None:
    """Take out of a slot the shortest sequence that is enough, or else the longest that may leave, until one more fits."""
    slow = slowness[slots.rank[slot]]
    mine = members(filling, lengths, slot)
    while True:
        over = slot_ticks(lengths, inserted(mine, sequence, lengths), alone, slow, pack, fixed) - slots.room[slot]
        if over <= 0:
            break
        out = -1
        for at in range(len(mine)):
            if _may_leave(lengths, mine[at], sequence, alone, fixed, most) and (
                out < 0 or scaled(alone[mine[at]], slow) >= over
            ):
                out = at
        if out < 0:
            break
        loose[mine[out]] = True
        mine = np.concatenate((mine[:out], mine[out + 1 :]))
    put(filling, slot, mine)
