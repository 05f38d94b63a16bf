"""Keepers in tests: of a run that does not exist, ended for certain."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evermesh.fault.snapshot.keeper.area import area_of, identity_in, sweep
from evermesh.fault.snapshot.keeper.client import KeeperClient
from evermesh.fault.snapshot.keeper.process import KeeperProcess
from evermesh.fault.snapshot.keeper.slots import NUM_SLOTS

WAIT_S = 20.0


@contextmanager
def keeper_of(
    run: Path, node: str = "node-0", key: str = "launch", secret: bytes | None = None, slots: int = NUM_SLOTS
) -> Iterator[KeeperProcess]:
    """A keeper that listens, with a ``secret`` also for other nodes; nothing of it is left at the end."""
    serving = {} if secret is None else {"host": "127.0.0.1", "secret": secret}
    keeper = KeeperProcess(area_of(run, node), key, run / f"{node}.log", slots=slots, **serving)  # type: ignore[arg-type]
    try:
        KeeperClient(keeper.area, WAIT_S).close()
        keeper.look()  # stays connected, as an agent does
        until_s = time.monotonic() + WAIT_S
        while secret is not None and keeper.address is None:
            assert time.monotonic() < until_s, "the keeper serves nobody"
            time.sleep(0.01)
        yield keeper
    finally:
        kill_keeper(keeper.area)
        keeper.leave()
        sweep()


def kill_keeper(area: Path) -> int:
    """SIGKILL; returns the number of the process, 0 if there was none."""
    found = identity_in(area)
    if found is None or not found.is_alive:
        return 0
    with suppress(ProcessLookupError):
        os.kill(found.pid, signal.SIGKILL)
    return found.pid
