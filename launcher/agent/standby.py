"""Workers in waiting: forks of the warm process that wait to be told which rank they are.

Forking a process that has torch loaded takes some 50 ms and more where several start at once. Done ahead, while training
runs, no restart waits for it. Until it is told its rank such a process shares its memory with the warm one.
"""

from contextlib import suppress
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from evermesh.launcher.agent import warm
from evermesh.launcher.agent.worker import WorkerSpec, wait_for_rank

_END_WAIT_S = 5.0


class StartedWorker(NamedTuple):
    """A process that knows its rank."""

    process: BaseProcess
    pipe: connection.Connection
    fresh_because: str | None
    """Why it is a fresh interpreter; None: it is a fork of the warm process."""


class Standbys:
    """Those of one node. Every method is called from one thread."""

    def __init__(self) -> None:
        self._waiting: list[StartedWorker] = []

    def fill(self, number: int) -> None:
        """Fork until ``number`` wait; nothing where the warm process must not be forked."""
        self._waiting = [one for one in self._waiting if one.process.is_alive()]
        while len(self._waiting) < number and warm.context()[1] is None:
            self._waiting.append(_start())

    def start(self, spec: WorkerSpec) -> StartedWorker:
        """Start the worker of ``spec``: one that waits, or else a new process."""
        while self._waiting:
            waiting = self._waiting.pop(0)
            with suppress(OSError):  # it has died meanwhile
                waiting.pipe.send(spec)
                return waiting
        started = _start()
        started.pipe.send(spec)
        return started

    def close(self) -> None:
        """End all that wait."""
        for waiting in self._waiting:
            waiting.process.kill()
            waiting.process.join(_END_WAIT_S)
            waiting.pipe.close()
        self._waiting = []


def _start() -> StartedWorker:
    context, fresh_because = warm.context()
    ours, theirs = context.Pipe()
    process = context.Process(target=wait_for_rank, args=(theirs,), name="evermesh-worker", daemon=True)
    with warm.blocked_signals():  # half started, it could not be killed
        process.start()
    theirs.close()  # only the worker holds it now: its end is our end of file
    return StartedWorker(process, ours, fresh_because)
