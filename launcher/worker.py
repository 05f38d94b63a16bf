"""One worker process: its pipe to the launcher, its watchdog, its log.

Messages are JSON objects with a ``kind``. Worker to launcher: ``report``, ``done``, ``failed``. Launcher to worker:
``stop``. The pipe is also a life line: when it closes the launcher is gone, and so is the worker. The fork server is
another: it ends with the launcher, and the kernel kills its children then.
"""

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from evermesh.launcher.interrupts import SIGNALS
from evermesh.parallelism.errors import EvermeshError

EXIT_LAUNCHER_GONE = 97
_PR_SET_PDEATHSIG = 1

_PEER_LOST = (
    "Connection reset by peer",
    "Connection closed by peer",
    "Connection refused",
    "Broken pipe",
    "Socket closed",
    "Timed out waiting",
    "remote process exited",
    "NCCL communicator was aborted",
)
"""What gloo, the rendezvous store and NCCL say when another rank is gone."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What a worker is told when it starts."""

    rank: int
    world_size: int
    init_method: str
    """URL of the rendezvous."""
    log: str
    """File that takes what the worker prints."""
    entry: str
    """``MODULE:FUNCTION`` to run as ``function(worker, **arguments)``; what it returns is sent back as JSON."""
    arguments: dict[str, Any]


class Worker:
    """What the function of a worker sees of the launcher."""

    def __init__(self, spec: WorkerSpec, connection: Connection) -> None:
        self.rank, self.world_size, self.init_method = spec.rank, spec.world_size, spec.init_method
        self._connection = connection
        self._stop = threading.Event()

    def report(self, values: dict[str, Any]) -> None:
        """Send ``values`` to the launcher."""
        self.send({"kind": "report", "values": values})

    def stop_asked(self) -> bool:
        """Whether the launcher asked to save and return."""
        return self._stop.is_set()

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; the launcher being gone is the watchdog's business."""
        self._connection.send_bytes(json.dumps(message).encode())

    def log(self, text: str) -> None:
        """Write a line to this worker's log."""
        print(f"{datetime.now():%Y-%m-%d %H:%M:%S} rank {self.rank}: {text}", file=sys.stderr, flush=True)

    def watch(self) -> None:
        """Take messages until the launcher is gone, then end this process, whatever it is doing."""
        try:
            while True:
                if json.loads(self._connection.recv_bytes())["kind"] == "stop":
                    self.log("asked to save and stop")
                    self._stop.set()
        except (EOFError, OSError):
            os._exit(EXIT_LAUNCHER_GONE)


def main(spec: WorkerSpec, connection: Connection) -> None:
    """Run the worker and end the process: it never returns."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _die_with_fork_server()
    _redirect(spec.log)
    os.environ.update(LOCAL_RANK=str(spec.rank), RANK=str(spec.rank), WORLD_SIZE=str(spec.world_size))
    worker = Worker(spec, connection)
    worker.log(f"process {os.getpid()} of {spec.world_size} workers; kill -USR1 writes here what it is doing")
    threading.Thread(target=worker.watch, name="watchdog", daemon=True).start()
    try:
        module, function = spec.entry.split(":")
        result = getattr(importlib.import_module(module), function)(worker, **spec.arguments)
    except BaseException as error:  # noqa: BLE001  the boundary: it is reported, and the launcher raises it again
        _fail(worker, error)
    worker.log(f"done: {result}")
    worker.send({"kind": "done", "result": result})
    _leave(0)


def _die_with_fork_server() -> None:
    """Have the kernel kill this process when the fork server ends, which ends when the launcher does.

    The watchdog is a thread: it cannot run while a library waits with the interpreter lock held, as the rendezvous
    of torch does, nor while this process is stopped.
    """
    server = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # the fork server lives as long as any process holds this descriptor: only the launcher shall
    alive = getattr(forkserver._forkserver, "_forkserver_alive_fd", None)
    if alive is not None:
        os.close(alive)
    if os.getppid() != server:
        os._exit(EXIT_LAUNCHER_GONE)


def _redirect(log: str) -> None:
    """Send everything this process prints, C++ libraries and crashes included, to ``log``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)


def _fail(worker: Worker, error: BaseException) -> None:
    text = "".join(traceback.format_exception(error))
    worker.log(f"failed\n{text}")
    failure = {
        "kind": "failed",
        "time_s": time.monotonic(),
        "error": type(error).__name__,
        "text": str(error),
        "expected": isinstance(error, EvermeshError),
        "peer_lost": any(mark in str(link) for link in _chain(error) for mark in _PEER_LOST),
        "traceback": text,
    }
    try:
        worker.send(failure)
    finally:
        _leave(1)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _leave(code: int) -> None:
    """End at once: at exit, communication libraries may wait for peers that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
