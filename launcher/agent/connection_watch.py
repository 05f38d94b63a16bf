"""How the connections of the ranks of a node do, for the controller: which there are, and what waits on them."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from evermesh.fault.connections import connections_of
from evermesh.launcher.watching.messages import MOST_ENDS, Connections, Held

_PAUSE_S = 0.9
_SHARE = 0.02
"""Of a core, at most, with what the kernel has to write down of many connections."""


class ConnectionWatch:
    """Of one generation."""

    def __init__(self, generation: int) -> None:
        self._generation, self._host = generation, _host()
        self._ends: dict[int, tuple[tuple[str, str], ...]] = {}
        self._says_ends = True
        self._next_s = 0.0

    def look(self, pids: Mapping[int, int], *, says_ends: bool) -> Connections | None:
        """What is to be told now of the processes of ranks; None: it is too early to look again. ``says_ends``: whoever
        hears it knows nothing."""
        self._says_ends |= says_ends
        began_s = time.monotonic()
        if began_s < self._next_s:
            return None
        found = connections_of(list(pids.values()))
        of_rank = {rank: found.get(pid, [])[:MOST_ENDS] for rank, pid in pids.items()}
        self._next_s = began_s + max(_PAUSE_S, (time.monotonic() - began_s) / _SHARE)
        ends = {rank: tuple(sorted((one.local, one.remote) for one in of)) for rank, of in of_rank.items()}
        says_ends, self._says_ends = self._says_ends or ends != self._ends, False
        self._ends = ends
        held = {rank: tuple(Held(**one._asdict()) for one in of if one.waiting_bytes) for rank, of in of_rank.items()}
        return Connections(
            generation=self._generation,
            host=self._host,
            ends=ends if says_ends else None,
            held={rank: of for rank, of in held.items() if of},
        )


def _host() -> str:
    """Boot and network namespace: processes with the same one reach each other at 127.0.0.1."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip() if boot.exists() else os.uname().nodename}:{os.stat('/proc/self/ns/net').st_ino}"
