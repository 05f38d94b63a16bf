"""Keepers in tests: of a run that does not exist, ended for certain."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from evermesh.fault.snapshot.keeper.area import area_of, identity_in, sweep
from evermesh.fault.snapshot.keeper.client import KeeperClient
from evermesh.fault.snapshot.keeper.process import KeeperProcess

WAIT_S = 20.0


@contextmanager
def keeper_of(run: Path, node: str = "node-0", key: str = "launch") -> Iterator[KeeperProcess]:
    """A keeper that listens; nothing of it is left at the end."""
    keeper = KeeperProcess(area_of(run, node), key, run / f"{node}.log")
    try:
        KeeperClient(keeper.area, WAIT_S).close()
        keeper.look()  # stays connected, as an agent does
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
