"""``python -m tests.benchmarks.launcher.rendezvous_clients HOST PORT RANKS PHASES``: ranks that only meet.

Each has a connection of its own to the store and asks for what a rank asks for when it starts. PHASES is a JSON file: a list
of lists of [operation, key, bytes], with ``{rank}`` and, for a rank so far behind or before it, ``{+1}`` or ``{-1}`` in keys.
Each of a few processes plays many ranks, phase by phase, so that whoever waits for a key waits for somebody who goes on. The
last line says how long each phase took, seconds.
"""

import json
import multiprocessing
import re
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

from torch.distributed import PrefixStore, Store, TCPStore

Operation = tuple[str, str, int]
_PROCESSES = 8
_TIMEOUT = timedelta(seconds=300)


def play(host: str, port: int, ranks: int, phases: list[list[Operation]]) -> list[float]:
    """Have all ranks meet; seconds of each phase, the first of which is to connect."""
    context = multiprocessing.get_context("fork")  # torch is loaded once
    pipes = []
    for part in range(_PROCESSES):
        ours, theirs = context.Pipe()
        own = range(part, ranks, _PROCESSES)
        context.Process(target=_play, args=(theirs, host, port, own, ranks, phases), daemon=True).start()
        pipes.append(ours)
    took_s = []
    for _ in range(1 + len(phases)):
        began_s = time.monotonic()
        for pipe in pipes:
            pipe.send(None)
        for pipe in pipes:
            pipe.recv()
        took_s.append(time.monotonic() - began_s)
    return took_s


def _play(pipe: Connection, host: str, port: int, own: range, ranks: int, phases: list[list[Operation]]) -> None:
    """Some of the ranks."""
    pipe.recv()
    stores: dict[int, Store] = {}
    for rank in own:
        client = TCPStore(host, port, is_master=False, timeout=_TIMEOUT)
        stores[rank] = PrefixStore("generation-1", client)
    pipe.send(None)
    for phase in phases:
        pipe.recv()
        for rank, store in stores.items():
            for operation, key, size in phase:
                _ask(store, operation, _of_rank(key, rank, ranks), size)
        pipe.send(None)


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
