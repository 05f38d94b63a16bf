"""``python -m evermesh.fault.snapshot.keeper AREA KEY IDLE_S SLOTS``: the keeper of a node."""

import os
import secrets
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from evermesh.fault.snapshot.keeper.area import Area
from evermesh.fault.snapshot.keeper.keeper import Keeper

_LOCK_WAIT_S, _LOCK_LOOK_S = 2.0, 0.01
"""Who sweeps an area holds its lock for an instant."""


def main(area: Path, key: str, idle_s: float, slots: int) -> int:
    """Keep so many snapshots of every rank in ``area``; returns what the process ends with."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # meant for others; the agent says when it is over
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o077)
    until_s = time.monotonic() + _LOCK_WAIT_S
    nonce = secrets.token_hex(8)
    while True:
        with suppress(BlockingIOError):
            held = Area(area, key, nonce, slots)
            break
        if time.monotonic() > until_s:
            print(f"{area} has a keeper", file=sys.stderr)
            return 1
        time.sleep(_LOCK_LOOK_S)
    Keeper(held, key, nonce, idle_s).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])))
