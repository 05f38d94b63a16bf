"""``python -m tests.benchmarks.launcher.rendezvous_clients HOST PORT RANKS TRACE``: ranks that only meet.

Each has a connection of its own to the store and asks for what a rank asks for when it starts. TRACE is a JSON list of
phases; a phase is a list of [operation, key, bytes], with RANK, and PEER0 and so on, in keys. A few threads play many ranks
each, phase by phase, so that whoever waits for a key waits for somebody who goes on.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from torch.distributed import PrefixStore, Store, TCPStore

Phase = list[tuple[str, str, int]]
_THREADS = 8
_TIMEOUT = timedelta(seconds=300)


def play(host: str, port: int, ranks: int, phases: list[Phase]) -> float:
    """Have all ranks meet; seconds from the first connection until the last one has all that it asked for."""
    began_s = time.monotonic()
    with ThreadPoolExecutor(_THREADS) as pool:
        for done in [
            pool.submit(_play, host, port, range(part, ranks, _THREADS), ranks, phases) for part in range(_THREADS)
        ]:
            done.result()
    return time.monotonic() - began_s


def _play(host: str, port: int, own: range, ranks: int, phases: list[Phase]) -> None:
    """Some of the ranks."""
    stores: dict[int, Store] = {}
    for rank in own:
        client = TCPStore(host, port, is_master=False, timeout=_TIMEOUT)
        stores[rank] = PrefixStore("generation-1", client)
    for phase in phases:
        for rank, store in stores.items():
            for operation, key, size in phase:
                _ask(store, operation, _of_rank(key, rank, ranks), size)


def _ask(store: Store, operation: str, key: str, size: int) -> None:
    if operation == "set":
        store.set(key, "x" * size)
    elif operation == "wait":
        store.wait([key], _TIMEOUT)
    else:
        assert len(store.get(key)) > 0


def _of_rank(key: str, rank: int, ranks: int) -> str:
    """Peers are the ranks behind this one, by powers of two: those of a barrier."""
    head, mark, number = key.partition("PEER")
    return f"{head}{(rank + (1 << int(number))) % ranks}" if mark else key.replace("RANK", str(rank))


if __name__ == "__main__":
    phases = json.loads(Path(sys.argv[4]).read_text())
    print(play(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), phases))
