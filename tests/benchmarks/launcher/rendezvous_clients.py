"""``python -m tests.benchmarks.launcher.rendezvous_clients HOST PORT RANKS PHASES``: ranks that only meet.

Each has a connection of its own to the store and asks for what a rank asks for when it starts. PHASES is a JSON file: a list
of lists of [operation, key, bytes], with ``{rank}`` and, for a rank so far behind or before it, ``{+1}`` or ``{-1}`` in keys.
Each of a few threads plays many ranks, phase by phase, so that whoever waits for a key waits for somebody who goes on. The
last line says how long each phase took, seconds.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

from torch.distributed import PrefixStore, Store, TCPStore

Operation = tuple[str, str, int]
_THREADS = 8
_TIMEOUT = timedelta(seconds=300)


def play(host: str, port: int, ranks: int, phases: list[list[Operation]]) -> list[float]:
    """Have all ranks meet; seconds of each phase, the first of which is to connect."""
    stores: dict[int, Store] = {}

    def connect(rank: int) -> None:
        client = TCPStore(host, port, is_master=False, timeout=_TIMEOUT)
        stores[rank] = PrefixStore("generation-1", client)

    def ask(phase: list[Operation], rank: int) -> None:
        for operation, key, size in phase:
            _ask(stores[rank], operation, _of_rank(key, rank, ranks), size)

    connects_s = _by_all(connect, ranks)
    return [connects_s, *(_by_all(partial(ask, phase), ranks) for phase in phases)]


def _by_all(function: Callable[[int], None], ranks: int) -> float:
    began_s = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        for done in [pool.submit(function, rank) for rank in range(ranks)]:
            done.result()
    return time.monotonic() - began_s


def _ask(store: Store, operation: str, key: str, size: int) -> None:
    if operation == "set":
        store.set(key, "x" * size)
    elif operation == "wait":
        store.wait([key], _TIMEOUT)
    else:
        assert len(store.get(key)) > 0


def _of_rank(key: str, rank: int, ranks: int) -> str:
    named = key.replace("{rank}", str(rank))
    return re.sub(r"\{([+-]\d+)\}", lambda found: str((rank + int(found[1])) % ranks), named)


if __name__ == "__main__":
    print(json.dumps(play(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), json.loads(Path(sys.argv[4]).read_text()))))
