"""Memory: patterns written and read back, and how fast it is copied."""

import time

import numpy as np

from evermesh.fault.health.verdicts import Verdict

_WORDS = np.uint64
_PATTERNS = (0x5555555555555555, 0xAAAAAAAAAAAAAAAA, 0xFFFFFFFFFFFFFFFF, 0)
_GIB = 1 << 30


def probe_memory(num_bytes: int = 64 << 20, budget_s: float = 1.0) -> Verdict:
    """Fill ``num_bytes`` with patterns, and each word with its own number; then copy for the rest of the time."""
    words = np.empty(num_bytes // 8, dtype=_WORDS)
    until = time.monotonic() + budget_s
    for pattern in _PATTERNS:
        words.fill(pattern)
        if (found := first_wrong(words, np.asarray(pattern, dtype=_WORDS))) is not None:
            return found
    order = np.arange(len(words), dtype=_WORDS)
    np.multiply(order, _WORDS(0x9E3779B97F4A7C15), out=words)  # a broken address line shows as another word's number
    if (found := first_wrong(words, order * _WORDS(0x9E3779B97F4A7C15))) is not None:
        return found
    best_s = float("inf")
    while best_s == float("inf") or time.monotonic() < until:
        began_s = time.perf_counter()
        np.copyto(order, words)
        best_s = min(best_s, time.perf_counter() - began_s)
    speed = 2 * num_bytes / best_s  # read and written
    numbers = {"tested_bytes": float(num_bytes), "bytes_per_s": speed}
    return Verdict(
        "memory test", "ok", f"{num_bytes >> 20} MiB hold what is written; {speed / _GIB:.1f} GiB/s", numbers
    )


def first_wrong(words: np.ndarray, expected: np.ndarray) -> Verdict | None:
    """The verdict about the words that differ; None if none does."""
    wrong = np.nonzero(words != expected)[0]
    if not len(wrong):
        return None
    place = int(wrong[0])
    value = int(np.broadcast_to(expected, words.shape)[place])
    bits = bin(int(words[place]) ^ value).count("1")
    reason = f"{len(wrong)} words differ from what was written; the first at byte {8 * place:,} in {bits} bits"
    way_out = "take the node out and test its memory modules (memtest86)"
    return Verdict("memory test", "bad", reason, {"wrong_words": float(len(wrong))}, way_out)
