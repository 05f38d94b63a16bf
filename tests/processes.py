"""Which processes of a test still run, and what processes that it starts find in their environment."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest


def still_alive(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Which of them live after that time; one that waits only to be reaped is dead."""
    until = time.monotonic() + timeout_s
    while found := [process for process in processes if lives(process)]:
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    return found


def lives(process: psutil.Process) -> bool:
    """Whether it runs now."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def who_shows(text: bytes) -> list[int]:
    """The processes of this machine that have ``text`` among their arguments or in the environment they were started with."""
    return [process.pid for process in psutil.process_iter() if text in _shown(process.pid)]


def _shown(pid: int) -> bytes:
    """Nothing if it is gone, or somebody else's."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes() + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """Environment variables for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield
