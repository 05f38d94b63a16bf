"""One worker process: its pipe to the agent, its watchdog, its log.

Messages are JSON objects with a ``kind``. Worker to agent: ``report``, ``plan``, ``done``, ``failed``. Agent to worker:
``save``, ``stop``, ``regroup``, ``change layout``, ``speeds``. The pipe is also a life line: when it closes the agent is
gone, and so is the worker. The warm process is another: it ends with the agent, and the kernel kills its children then.
"""

import faulthandler
import importlib
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evermesh.fault.recorder.ring import RingSpec
from evermesh.fault.snapshot.remote import Keepers
from evermesh.launcher.agent.shared_memory import POINTS, Board, Slot
from evermesh.launcher.death import end_with_parent
from evermesh.launcher.interrupts import SIGNALS
from evermesh.parallelism.collectives import Point
from evermesh.parallelism.errors import EvermeshError

if TYPE_CHECKING:
    from torch.distributed import Store

EXIT_AGENT_GONE = 97
_PLAN_EVERY_S = 1.0
_RECENT_STEPS = 32

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
    local_rank: int
    world_size: int
    local_world_size: int
    """Ranks of this node."""
    node_rank: int
    generation: int
    store: tuple[str, int]
    """Host and port where the ranks meet."""
    settings: dict[str, str]
    """Variables of gloo and NCCL, for those that the environment has not set already."""
    log: str
    """File that takes what the worker prints; what it is doing, when asked, goes into the same name with ``.stacks``."""
    board: str | None
    """The board of the node's shared-memory area."""
    entry: str
    """``MODULE:FUNCTION`` to run as ``function(worker, **arguments)``; what it returns is sent back as JSON."""
    arguments: dict[str, Any]
    keeper: str | None = None
    """Where the node's keeper holds snapshots; None: there is none."""
    keepers: Keepers | None = None
    """Where those of all nodes are read."""
    ring: RingSpec | None = None
    """Where its collectives are recorded; None: nowhere."""


class Worker:
    """What the function of a worker sees of the agent."""

    def __init__(self, spec: WorkerSpec, connection: Connection) -> None:
        self.rank, self.world_size, self.generation = spec.rank, spec.world_size, spec.generation
        self._spec, self._connection = spec, connection
        self.keeper = Path(spec.keeper) if spec.keeper else None
        self.keepers = spec.keepers
        self.ring = spec.ring
        self._board = Board(Path(spec.board)) if spec.board else None
        self._asked: deque[Literal["save", "stop", "regroup"] | dict[str, Any]] = deque()
        self._speeds: dict[int, float] | None = None
        self._last_plan_s = -math.inf
        self._recent_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._slot = Slot(spec.generation, os.getpid(), 0, 0.0, 0.0)
        self._show(self._slot)

    def store(self, timeout_s: float) -> "Store":
        """Where the ranks of this generation meet; no other generation sees its keys."""
        from torch.distributed import PrefixStore, TCPStore

        host, port = self._spec.store
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
        return PrefixStore(f"generation-{self.generation}", store)

    def beat(self, step: int, step_s: float, compute_s: float) -> None:
        """Write down, where the agent sees it without asking, that ``step`` steps are finished."""
        self._recent_s.append(step_s)
        longest_s = max(self._recent_s)
        self._show(self._slot._replace(step=step, step_s=step_s, compute_s=compute_s, longest_s=longest_s))

    def reach(self, point: Point) -> None:
        """Write down there, too, where in a step, or between steps, this rank is now."""
        self._show(self._slot._replace(point=POINTS.index(point)))

    def report(self, values: dict[str, Any]) -> None:
        """Send ``values`` to the controller."""
        self.send({"kind": "report", "values": values})

    def show_plan(self, values: Callable[[], dict[str, Any]]) -> None:
        """Send the plan of the current batch to the controller, at most once in a while."""
        if time.monotonic() - self._last_plan_s >= _PLAN_EVERY_S:
            self._last_plan_s = time.monotonic()
            self.send({"kind": "plan", "values": values()})

    def asked(self) -> Literal["save", "stop", "regroup"] | dict[str, Any] | None:
        """What was asked for since the last call: to save, to save and return, to leave the state in memory and return, or
        changes to the layout. Once asked to stop, always that."""
        if "stop" in self._asked:
            return "stop"
        return self._asked.popleft() if self._asked else None

    def speeds(self) -> dict[int, float] | None:
        """How fast ranks are by now, those that are not nominal; None: nothing new was told since the last call."""
        told, self._speeds = self._speeds, None
        return told

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; the agent being gone is the watchdog's business."""
        self._connection.send_bytes(json.dumps(message).encode())

    def _show(self, slot: Slot) -> None:
        self._slot = slot
        if self._board is not None:
            self._board.write(self._spec.local_rank, slot)

    def log(self, text: str) -> None:
        """Write a line to this worker's log."""
        print(f"{datetime.now():%Y-%m-%d %H:%M:%S} rank {self.rank}: {text}", file=sys.stderr, flush=True)

    def watch(self) -> None:
        """Take messages until the agent is gone, then end this process, whatever it is doing."""
        try:
            while True:
                message = json.loads(self._connection.recv_bytes())
                self.log(f"asked to {message['kind']}")
                if message["kind"] == "speeds":
                    self._speeds = {int(rank): speed for rank, speed in message["speeds"].items()}
                else:
                    self._asked.append(message.get("changes", message["kind"]))
        except (EOFError, OSError):
            os._exit(EXIT_AGENT_GONE)


def wait_for_rank(connection: Connection) -> None:
    """Wait to be told which rank this process is, and run it: it never returns."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    try:
        spec = connection.recv()  # of the agent that has forked this process
    except (EOFError, OSError):
        os._exit(EXIT_AGENT_GONE)
    _run(spec, connection)


def _run(spec: WorkerSpec, connection: Connection) -> None:
    _redirect(spec.log)
    os.environ.update(_environment(spec))
    worker = Worker(spec, connection)
    worker.log(f"generation {spec.generation}, process {os.getpid()}, one of {spec.world_size} workers")
    threading.Thread(target=worker.watch, name="watchdog", daemon=True).start()
    try:
        module, function = spec.entry.split(":")
        result = getattr(importlib.import_module(module), function)(worker, **spec.arguments)
    except BaseException as error:  # noqa: BLE001  the boundary: it is reported, and decides what becomes of the attempt
        _fail(worker, error)
    worker.log(f"done: {result}")
    worker.send({"kind": "done", "result": result})
    _leave(0)


def _environment(spec: WorkerSpec) -> dict[str, str]:
    """torchrun's variables, for libraries that look at them, and settings that the user has not made otherwise."""
    values = {
        "RANK": spec.rank,
        "LOCAL_RANK": spec.local_rank,
        "WORLD_SIZE": spec.world_size,
        "LOCAL_WORLD_SIZE": spec.local_world_size,
        "GROUP_RANK": spec.node_rank,
    }
    chosen = {name: value for name, value in spec.settings.items() if name not in os.environ}
    return {name: str(value) for name, value in values.items()} | chosen


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends: the warm process, which ends when the agent does.

    The watchdog is a thread: it cannot run while a library waits with the interpreter lock held, as the rendezvous
    of torch does, nor while this process is stopped.
    """
    parent = os.getppid()
    end_with_parent()
    # the warm process lives as long as any process holds this descriptor: only the agent shall
    alive = getattr(forkserver._forkserver, "_forkserver_alive_fd", None)
    if alive is not None:
        os.close(alive)
    if os.getppid() != parent:
        os._exit(EXIT_AGENT_GONE)


def _redirect(log: str) -> None:
    """Send everything this process prints, C++ libraries and crashes included, to ``log``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    faulthandler.enable()
    # never closed: the handler may be called at any time
    stacks = os.open(Path(log).with_suffix(".stacks"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    faulthandler.register(signal.SIGUSR1, stacks)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


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
