"""How much of the time processes wait for a processor although they would run; see schedstats of the kernel."""

import time
from collections import deque
from pathlib import Path

WINDOW_S, _LEAST_S = 1.0, 0.3
"""What shares are of, and the shortest part of it that says anything."""


class QueueWatch:
    """Looks at the main threads of some processes again and again."""

    def __init__(self) -> None:
        self._seen: dict[int, deque[tuple[float, int]]] = {}
        """By process: when it was looked at, and nanoseconds that it had waited until then."""

    def look(self, pid: int) -> float:
        """Share of the last second in which a process waited for a processor; 0 where nobody knows."""
        try:
            waited_ns = int(Path(f"/proc/{pid}/schedstat").read_bytes().split()[1])
        except (OSError, IndexError, ValueError):
            return 0.0
        now_s = time.monotonic()
        seen = self._seen.setdefault(pid, deque())
        seen.append((now_s, waited_ns))
        while len(seen) > 2 and seen[1][0] <= now_s - WINDOW_S:
            seen.popleft()
        first_s, first_ns = seen[0]
        span_s = now_s - first_s
        return min((waited_ns - first_ns) / 1e9 / span_s, 1.0) if span_s >= _LEAST_S else 0.0
