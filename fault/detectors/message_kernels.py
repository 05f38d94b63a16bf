"""Messages of ranks, and both ends of each; words of records as in ``kernels``."""

from typing import Any

import numpy as np

from evermesh.parallelism.planner.compiling import compiled

_SEND = 10
_LOW = np.uint64(0xFFFFFFFF)
_BYTE = np.uint64(0xFF)


@compiled
def newest_messages(
    words: Any, local_groups: Any, places: Any, sizes: Any, trace: int, shift_ns: int, most: int, found: Any, count: int
) -> int:
    """Put the newest messages of a rank, at most ``most``, behind the first ``count`` rows of ``found`` [messages, 7].

    Return how many rows there are then. Columns: key (the same at both ends), whether it was received, trace, number,
    entered, ended, bytes.
    """
    last = count + most
    for index in range(len(words) - 1, -1, -1):
        operation = np.int64((words[index, 7] >> np.uint64(32)) & _BYTE)
        if operation != _SEND and operation != _SEND + 1:
            continue
        if count == last:
            break
        local, peer = np.int64(words[index, 5] & _LOW), np.int64(words[index, 7] & _LOW)
        if local >= len(local_groups) or local_groups[local] < 0 or peer >= sizes[local_groups[local]]:
            continue
        source, target = places[local], peer
        if operation != _SEND:
            source, target = peer, places[local]
        number = np.int64(words[index, 5] >> np.uint64(32))
        found[count, 0] = local_groups[local] << 43 | source << 29 | target << 15 | number & 0x7FFF
        found[count, 1] = operation - _SEND
        found[count, 2] = trace
        found[count, 3] = number
        found[count, 4] = np.int64(words[index, 1]) - shift_ns
        found[count, 5] = np.int64(words[index, 3]) - shift_ns if words[index, 3] > 0 else 0
        found[count, 6] = np.int64(words[index, 4])
        count += 1
    return count


@compiled
def pair_messages(messages: Any, order: Any, pairs: Any) -> int:
    """Find in messages, ordered by key, what was sent and received: rows of ``pairs`` [messages, 2]; return how many."""
    count = 0
    for index in range(len(order) - 1):
        one, other = order[index], order[index + 1]
        is_one = messages[one, 0] == messages[other, 0] and messages[one, 3] == messages[other, 3]
        if is_one and messages[one, 1] != messages[other, 1]:
            is_sent = messages[one, 1] == 0
            pairs[count, 0], pairs[count, 1] = (one, other) if is_sent else (other, one)
            count += 1
    return count
