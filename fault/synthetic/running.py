"""Runs the programs of a synthetic job: who waits for whom, event by event, as blocking collectives do.

A collective ends a transfer after its last rank has entered; a rank whose operation or bytes differ from those of the first
keeps all of them in it. A message is sent without waiting for its receiver.
"""

from typing import Any

import numpy as np

from evermesh.fault.mixing import MIXER
from evermesh.parallelism.planner.compiling import compiled

_NEVER = 1e30
_FIRST = 10  # send; what follows are receives


@compiled
def run_events(
    words: Any,
    work_s: Any,
    starts: Any,
    counts: Any,
    group_of: Any,
    place_of: Any,
    members: Any,
    member_starts: Any,
    instance_starts: Any,
    message_starts: Any,
    group_factor: Any,
    message_factor: Any,
    slow_from_step: int,
    frozen: Any,
    jitters: Any,
    latency_ns: float,
    ns_per_byte: float,
    begin_ns: int,
) -> Any:
    """Fill in the times of ``words`` (records as 64-bit words) and return how many records each rank entered.

    ``group_of`` and ``place_of`` [ranks, axes]: group and place in it; ``members`` by ``member_starts``: ranks of groups;
    ``instance_starts``, ``message_starts``: where the collectives and messages of a group are counted.
    """
    num_ranks = len(starts)
    now = np.full(num_ranks, begin_ns, np.int64)
    position = np.zeros(num_ranks, np.int64)
    waits = np.full(num_ranks, -1, np.int64)
    arrived = np.zeros(instance_starts[-1], np.int32)
    latest = np.zeros(instance_starts[-1], np.int64)
    first = np.zeros(instance_starts[-1], np.int64)
    sent = np.zeros(message_starts[-1], np.int64)
    receiver = np.full(message_starts[-1], -1, np.int64)
    entered = np.zeros(num_ranks, np.int64)
    stack = np.empty(num_ranks, np.int64)
    for rank in range(num_ranks):
        stack[rank] = num_ranks - 1 - rank
    depth = num_ranks
    while depth > 0:
        depth -= 1
        rank = stack[depth]
        while position[rank] < counts[rank]:
            row = starts[rank] + position[rank]
            if work_s[row] > _NEVER:
                break
            at = now[rank] + np.int64(work_s[row] * 1e9)
            words[row, 1] = at
            words[row, 2] = at + 2_000
            entered[rank] = position[rank] + 1
            axis = words[row, 5] & np.uint64(0xFFFFFFFF)
            number = np.int64(words[row, 5] >> np.uint64(32))
            step = np.int64(words[row, 6] & np.uint64(0xFFFFFFFF))
            peer = np.int64(words[row, 7] & np.uint64(0xFFFFFFFF))
            operation = np.int64((words[row, 7] >> np.uint64(32)) & np.uint64(0xFF))
            group = group_of[rank, np.int64(axis)]
            size = member_starts[group + 1] - member_starts[group]
            noise = (np.uint64(row) * MIXER) >> np.uint64(52)
            transfer = latency_ns + ns_per_byte * np.float64(words[row, 4]) * jitters[np.int64(noise)]
            if operation >= _FIRST:
                place = place_of[rank, np.int64(axis)]
                source = place if operation == _FIRST else peer
                target = peer if operation == _FIRST else place
                forward = (source + 1) % size == target
                per_edge = (message_starts[group + 1] - message_starts[group]) // (2 * size)
                edge = 2 * source if forward else 2 * source + 1
                message = message_starts[group] + edge * per_edge + number
                if operation == _FIRST:
                    factor = message_factor[member_starts[group] * 2 + edge] if step >= slow_from_step else 1.0
                    sent[message] = at + np.int64(transfer * factor)
                    words[row, 3] = at + 5_000
                    now[rank] = at + 5_000
                    position[rank] += 1
                    other = receiver[message]
                    if other >= 0:
                        behind = starts[other] + position[other]
                        end = max(np.int64(words[behind, 1]), sent[message]) + 2_000
                        words[behind, 3] = end
                        now[other] = end
                        position[other] += 1
                        stack[depth] = other
                        depth += 1
                    continue
                if sent[message] == 0:
                    receiver[message] = rank
                    break
                end = max(at, sent[message]) + 2_000
                words[row, 3] = end
                now[rank] = end
                position[rank] += 1
                continue
            instance = instance_starts[group] + number
            if arrived[instance] < 0:  # somebody differs: nobody leaves
                break
            if arrived[instance] == 0:
                first[instance] = row
            else:
                known = first[instance]
                differs = words[row, 4] != words[known, 4] or words[row, 7] << np.uint64(16) != words[
                    known, 7
                ] << np.uint64(16)
                if differs:
                    arrived[instance] = -1
                    break
            arrived[instance] += 1
            latest[instance] = max(latest[instance], at)
            if arrived[instance] < size:
                waits[rank] = instance
                break
            is_frozen = False
            for index in range(len(frozen)):
                is_frozen = is_frozen or frozen[index] == instance
            if is_frozen:
                break
            factor = group_factor[group] if step >= slow_from_step else 1.0
            end = latest[instance] + np.int64(transfer * factor)
            for member in range(member_starts[group], member_starts[group + 1]):
                other = members[member]
                if other != rank and waits[other] != instance:
                    continue
                behind = starts[other] + position[other]
                leaves = end + np.int64((np.uint64(behind) * MIXER) >> np.uint64(50))
                words[behind, 3] = leaves
                now[other] = leaves
                position[other] += 1
                waits[other] = -1
                if other != rank:
                    stack[depth] = other
                    depth += 1
    return entered
