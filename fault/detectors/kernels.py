"""The loops over all records: one pass that surveys a rank, one that lays its collectives beside those of the others.

They read records as eight 64-bit words (see RECORD): 1 entered, 3 ended, 4 bytes, 5 group and number, 6 step and site,
7 peer, operation, dtype, phase and flags.
"""

from typing import Any

import numpy as np

from evermesh.fault.mixing import MIXER
from evermesh.parallelism.planner.compiling import compiled

FIRST, LAST, LAST_ENTERED_NS, LONGEST_NS, LAST_STEP, BEFORE_NS = 0, 1, 2, 3, 4, 5
SLOT_COLUMNS = 6
"""Of a rank in a group: first and last number that it entered, when it entered that and in which step; longest time between
two in training, in the newest stretch of steps and in the one before. That of the first steps is forgotten."""
STRETCH_STEPS, STRETCH_NUMBERS = 64, 4096
"""Steps of a stretch, and collectives where nobody counts steps: an old hang makes nobody patient for good."""

TRAIN_NS, INPUT_NS, OTHER_NS, INSIDE_NS, COUNT, UNSEEN, BEGIN_NS, END_NS = 0, 1, 2, 3, 4, 5, 6, 7
STEP_COLUMNS = 8
"""Of a rank in a step: time in which nothing of it was under way, before records of training, input and other phases; time in
which something was; records; records whose end nobody saw; first entry; last end."""

NO_STEP = np.uint64(0xFFFFFFFFFFFFFFFF)
DIFFERS_OPERATION, DIFFERS_BYTES, DIFFERS_DTYPE, DIFFERS_STEP, DIFFERS_PEER = 1, 2, 4, 8, 16

BLOCK = 32
"""Collectives of a group that are compared at once where only digests are exchanged."""

_SEND = 10
_WARM_STEPS = 2
_DATA, _TRAIN = 1, 3  # phases
_LOW = np.uint64(0xFFFFFFFF)
_BYTE = np.uint64(0xFF)


@compiled
def survey_rank(
    words: Any, slots: Any, codes: Any, first_step: int, of_slot: Any, of_step: Any, signatures: Any, carried: Any
) -> int:
    """Add what records say of a rank; return the index of its first open record, or -1.

    ``slots`` [local groups]: row of ``of_slot`` [slots, SLOT_COLUMNS], or -1; ``codes``: what stands for the group in
    signatures; ``of_step`` [steps, STEP_COLUMNS]; ``signatures`` [steps]: what the rank did in a step, in order;
    ``carried`` [1]: when it last left a collective; 0 before its first record.
    """
    opened = -1
    frontier = carried[0]
    for index in range(len(words)):
        entered, ended = np.int64(words[index, 1]), np.int64(words[index, 3])
        group = np.int64(words[index, 5] & _LOW)
        number = np.int64(words[index, 5] >> np.uint64(32))
        step = np.int64(words[index, 6] & _LOW) - first_step
        kinds = words[index, 7] >> np.uint64(32)
        operation = np.int64(kinds & _BYTE)
        phase = np.int64((kinds >> np.uint64(16)) & _BYTE)
        flags = np.int64((kinds >> np.uint64(24)) & _BYTE)
        is_open = ended == 0 and flags & 1 != 0
        if is_open and opened < 0:
            opened = index
        slot = slots[group] if group < len(slots) else -1
        if slot >= 0 and operation < _SEND:
            now, last = step + first_step, of_slot[slot, LAST_STEP]
            if last <= _WARM_STEPS < now:
                of_slot[slot, LONGEST_NS] = of_slot[slot, BEFORE_NS] = 0
            elif (now // STRETCH_STEPS != last // STRETCH_STEPS) or (
                now == 0 and number // STRETCH_NUMBERS != of_slot[slot, LAST] // STRETCH_NUMBERS
            ):
                of_slot[slot, BEFORE_NS], of_slot[slot, LONGEST_NS] = of_slot[slot, LONGEST_NS], 0
            of_slot[slot, LAST_STEP] = now
            if of_slot[slot, FIRST] < 0:
                of_slot[slot, FIRST] = number
            elif phase == _TRAIN:
                of_slot[slot, LONGEST_NS] = max(of_slot[slot, LONGEST_NS], entered - of_slot[slot, LAST_ENTERED_NS])
            of_slot[slot, LAST] = max(of_slot[slot, LAST], number)
            of_slot[slot, LAST_ENTERED_NS] = entered
        if 0 <= step < len(of_step):
            row = of_step[step]
            if frontier > 0 and entered > frontier:
                column = TRAIN_NS if phase == _TRAIN else (INPUT_NS if phase == _DATA else OTHER_NS)
                row[column] += entered - frontier
            if row[COUNT] == 0:
                row[BEGIN_NS] = entered
            row[COUNT] += 1
            if flags & 1 != 0 and ended > 0:
                row[INSIDE_NS] += max(ended - max(entered, frontier), 0)
            else:
                row[UNSEEN] += 1
            row[END_NS] = max(ended, entered)
            # what may differ although the work is the same: other phases
            if phase == _TRAIN:
                what = codes[group] if group < len(codes) else np.uint64(0)
                what ^= words[index, 4] * MIXER
                what ^= (kinds & np.uint64(0xFFFF)) << np.uint64(7)
                signatures[step] = (signatures[step] ^ what) * MIXER + np.uint64(1)
        frontier = max(frontier, entered, ended)
    carried[0] = frontier
    return opened


@compiled
def digest_rank(words: Any, local_groups: Any, uneven: Any, state: Any, found: Any) -> int:
    """Digests of blocks of BLOCK collectives of each group, in ``found`` [digests, 3]: group, block, digest. Return how many.

    ``state`` [local groups, 3]: block that is under way, its digest, and whether that holds all from its first collective on.
    ``uneven`` [operations]: bytes may differ.
    """
    count = 0
    for index in range(len(words)):
        group = np.int64(words[index, 5] & _LOW)
        kinds = words[index, 7] & np.uint64(0xFFFFFFFFFFFF)
        operation = np.int64((kinds >> np.uint64(32)) & _BYTE)
        if operation >= _SEND or group >= len(local_groups) or local_groups[group] < 0:
            continue
        number = words[index, 5] >> np.uint64(32)
        block = np.int64(number) // BLOCK
        if block != state[group, 0]:
            if state[group, 2] != 0 and count < len(found):
                found[count, 0], found[count, 1] = local_groups[group], state[group, 0]
                found[count, 2] = state[group, 1]
                count += 1
            state[group, 0], state[group, 1] = block, 0
            state[group, 2] = 1 if np.int64(number) % BLOCK == 0 else 0
        value = number ^ kinds * MIXER ^ (words[index, 6] & _LOW) << np.uint64(20)
        if not uneven[operation]:
            value ^= words[index, 4] * np.uint64(0xC2B2AE3D27D4EB4F)
        state[group, 1] = np.int64(np.uint64(state[group, 1]) + (value ^ value >> np.uint64(29)) * MIXER)
    return count


@compiled
def lay_beside(
    words: Any,
    local_groups: Any,
    places: Any,
    sizes: Any,
    first_numbers: Any,
    row_starts: Any,
    cell_starts: Any,
    shift_ns: int,
    times: Any,
    reference: Any,
    flags: Any,
) -> None:
    """Put the collectives of one rank into the cells of their groups, and compare each with the first that was put there.

    A group has rows, one for each number from ``first_numbers`` on, and in each a cell for every member. ``times``
    [cells, 2]: entered and ended, minus ``shift_ns``. ``reference`` [rows, 3]: bytes; peer, operation and dtype;
    step, NO_STEP where nobody entered. ``flags`` [rows]: what differs.
    """
    for index in range(len(words)):
        group = np.int64(words[index, 5] & _LOW)
        operation = np.int64((words[index, 7] >> np.uint64(32)) & _BYTE)
        if operation >= _SEND or group >= len(local_groups) or local_groups[group] < 0:
            continue
        known = local_groups[group]
        at = np.int64(words[index, 5] >> np.uint64(32)) - first_numbers[known]
        if at < 0 or at >= row_starts[known + 1] - row_starts[known]:
            continue
        row = row_starts[known] + at
        cell = cell_starts[known] + at * sizes[known] + places[group]
        times[cell, 0] = np.int64(words[index, 1]) - shift_ns
        if words[index, 3] > 0:
            times[cell, 1] = np.int64(words[index, 3]) - shift_ns
        step = words[index, 6] & _LOW
        kinds = words[index, 7] & np.uint64(0xFFFFFFFFFFFF)
        if reference[row, 2] == NO_STEP:
            reference[row, 0], reference[row, 1], reference[row, 2] = words[index, 4], kinds, step
            continue
        if reference[row, 2] != step:
            flags[row] |= DIFFERS_STEP
        if reference[row, 0] != words[index, 4]:
            flags[row] |= DIFFERS_BYTES
        if reference[row, 1] != kinds:
            other = reference[row, 1] ^ kinds
            if other & _LOW != 0:
                flags[row] |= DIFFERS_PEER
            if (other >> np.uint64(32)) & _BYTE != 0:
                flags[row] |= DIFFERS_OPERATION
            if (other >> np.uint64(40)) & _BYTE != 0:
                flags[row] |= DIFFERS_DTYPE


@compiled
def transfer_times(
    entered_at: Any, ended_at: Any, sizes: Any, row_starts: Any, cell_starts: Any, transfers: Any
) -> None:
    """``transfers`` [rows]: the shortest time that a member was inside, which is that of the last to enter: no clocks are
    compared. 0 where not all are known to have left."""
    for group in range(len(sizes)):
        size = sizes[group]
        for at in range(row_starts[group + 1] - row_starts[group]):
            first = cell_starts[group] + at * size
            shortest = np.int64(4611686018427387904)
            for cell in range(first, first + size):
                if ended_at[cell] == 0 or entered_at[cell] == 0:
                    shortest = np.int64(0)
                    break
                shortest = min(shortest, ended_at[cell] - entered_at[cell])
            transfers[row_starts[group] + at] = shortest
