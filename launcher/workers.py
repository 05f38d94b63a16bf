"""The workers of this machine: started from a warm process, watched, ended together; imports no torch.

A fork server loads torch and the trainer once; every worker is forked from it in milliseconds.
"""

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver, get_context, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from evermesh.launcher.errors import WorkersFailed
from evermesh.launcher.interrupts import SIGNALS
from evermesh.launcher.restarts import Cause
from evermesh.launcher.worker import WorkerSpec, main

_CONTEXT = get_context("forkserver")
_TICK_S = 0.1
_SETTLE_S = 0.5
"""After a failure: how long another rank may still name an earlier one."""
_ROOT_CAUSE_WAIT_S = 5.0
"""After a rank lost its peer: how long the peer has to say, or show, why."""
_END_WAIT_S = 10.0
"""How long a killed process may take to disappear."""
_LOG_LINES = 8


@dataclass(frozen=True, slots=True)
class Failure:
    """How one worker failed."""

    rank: int
    time_s: float
    """Monotonic clock of the machine."""
    text: str
    peer_lost: bool = False
    """It only noticed that another rank is gone."""
    traceback: str | None = None
    cause: Cause = "raised"


@dataclass(slots=True, eq=False)
class _Member:
    rank: int
    process: BaseProcess
    pipe: connection.Connection
    log: Path
    result: dict[str, Any] | None = None
    failure: Failure | None = None
    reports: list[dict[str, Any]] = field(default_factory=list)
    ended: bool = False
    """The process is gone and its pipe is empty."""

    @property
    def is_done(self) -> bool:
        return self.result is not None


class WorkerGroup:
    """The workers of one attempt. Leaving its ``with`` block ends all of them."""

    def __init__(self, entry: str, arguments: dict[str, Any], *, workers: int, logs: Path, threads: int = 1) -> None:
        self._entry, self._arguments, self._workers, self._logs, self._threads = (
            entry,
            arguments,
            workers,
            logs,
            threads,
        )
        self._folder = tempfile.TemporaryDirectory(prefix="evermesh-")
        self._members: list[_Member] = []

    def __enter__(self) -> Self:
        try:
            _warm_up(self._entry.split(":")[0], self._threads)
            for rank in range(self._workers):
                self._members.append(self._start(rank))
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def process_ids(self) -> dict[int, int]:
        """Process of every living worker, by rank."""
        return {member.rank: member.process.pid for member in self._members if member.process.pid and not member.ended}

    def ask_stop(self) -> None:
        """Ask all workers to save and return; which of them listens is their business."""
        for member in self._members:
            if not member.ended:
                _send(member.pipe, {"kind": "stop"})

    def wait(self, on_report: Callable[[dict[str, Any]], None], on_tick: Callable[[], None]) -> dict[str, Any]:
        """Wait until every worker is done; return what rank 0 returned. ``on_tick`` is called at least every 0.1 s.

        Raises:
            WorkersFailed: a worker raised or died; says which one was the first, and all have been ended.
        """
        while not all(member.is_done for member in self._members):
            on_tick()
            self._poll(on_report)
            if self._failures():
                self._gather_failures(on_report)
                silent = [member.rank for member in self._members if not (member.failure or member.is_done)]
                self.kill()
                raise _explained(root_cause(self._failures()), self._members, silent)
        return self._members[0].result or {}

    def kill(self) -> None:
        """End every worker at once and wait until they are gone."""
        for member in self._members:
            member.process.kill()
        for member in self._members:
            member.process.join(_END_WAIT_S)
            member.pipe.close()
        self._folder.cleanup()

    def _start(self, rank: int) -> _Member:
        ours, theirs = _CONTEXT.Pipe()
        log = self._logs / f"rank-{rank}.log"
        rendezvous = f"file://{self._folder.name}/rendezvous"
        spec = WorkerSpec(rank, self._workers, rendezvous, str(log.absolute()), self._entry, self._arguments)
        process = _CONTEXT.Process(target=main, args=(spec, theirs), name=f"evermesh-rank-{rank}", daemon=True)
        with _blocked_signals():  # half started, it could not be killed
            process.start()
        theirs.close()  # only the worker holds it now: its end is our end of file
        return _Member(rank, process, ours, log)

    def _poll(self, on_report: Callable[[dict[str, Any]], None]) -> None:
        """Take what the workers sent and note who is gone."""
        living = [member for member in self._members if not member.ended]
        ready = connection.wait([*(m.pipe for m in living), *(m.process.sentinel for m in living)], timeout=_TICK_S)
        for member in living:
            if member.process.sentinel in ready:
                _drain(member)
                _note_end(member)
            elif member.pipe in ready:
                _drain(member)
            while member.reports:
                on_report(member.reports.pop(0))

    def _gather_failures(self, on_report: Callable[[dict[str, Any]], None]) -> None:
        """Wait for the root cause: a rank that lost its peer often says so before the peer does."""
        first_s = time.monotonic()
        while not all(member.ended for member in self._members):
            known = any(not failure.peer_lost for failure in self._failures())
            if time.monotonic() > first_s + (_SETTLE_S if known else _ROOT_CAUSE_WAIT_S):
                return
            self._poll(on_report)

    def _failures(self) -> list[Failure]:
        return [member.failure for member in self._members if member.failure]


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The earliest failure that is not only the loss of a peer; the earliest of all where there is no other."""
    return min(failures, key=lambda failure: (failure.peer_lost, failure.time_s))


def _warm_up(module: str, threads: int) -> None:
    """Start the fork server, unless it runs already, and wait until it has loaded ``module``.

    Raises:
        WorkersFailed: it ended while it loaded the module.
    """
    _CONTEXT.set_forkserver_preload([module])
    # started on its own first: starting it unblocks SIGINT and SIGTERM, which it ignores itself
    with _blocked_signals():
        resource_tracker.ensure_running()
    with _thread_limits(threads), _blocked_signals():
        forkserver.ensure_running()
    probe = _CONTEXT.Process(target=_nothing, daemon=True)
    try:
        probe.start()
    except (EOFError, ConnectionError) as error:
        text = f"the process that forks workers ended while it loaded {module}; its error is above."
        raise WorkersFailed(text, rank=0) from error
    probe.join(_END_WAIT_S)


def _nothing() -> None:
    """What a process runs that only shows that the fork server answers."""


@contextmanager
def _thread_limits(threads: int) -> Iterator[None]:
    """The environment that numeric libraries read when they are loaded."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """What starts inside inherits the mask: Ctrl-C reaches the whole process group, but only the launcher decides."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _send(pipe: connection.Connection, message: dict[str, Any]) -> None:
    try:
        pipe.send_bytes(json.dumps(message).encode())
    except OSError:
        return  # it is gone, which the next poll notes


def _drain(member: _Member) -> None:
    try:
        while member.pipe.poll():
            _take(member, json.loads(member.pipe.recv_bytes()))
    except (EOFError, OSError):
        # closed before the process is reaped: wait for that, so that its exit code is known
        member.process.join(_END_WAIT_S)
        _note_end(member)


def _take(member: _Member, message: dict[str, Any]) -> None:
    if message["kind"] == "report":
        member.reports.append(message["values"])
    elif message["kind"] == "done":
        member.result = message["result"] or {}
    else:
        text = message["text"] if message["expected"] else f"{message['error']}: {message['text']}"
        traceback = None if message["expected"] else message["traceback"]
        cause: Cause = "refused" if message["expected"] else "raised"
        member.failure = Failure(member.rank, message["time_s"], text, message["peer_lost"], traceback, cause)


def _note_end(member: _Member) -> None:
    if member.ended:
        return
    member.ended = True
    if not member.is_done and not member.failure:
        text = _death(member.process.exitcode) + _last_lines(member.log)
        member.failure = Failure(member.rank, time.monotonic(), text, cause="died")


def _death(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"it ended without a word (exit code {exit_code})."
    text = f"it was killed by signal {-exit_code} ({signal.Signals(-exit_code).name})."
    if -exit_code == signal.SIGKILL:
        return f"{text} If memory ran out (dmesg tells), lower train.layout.capacity or the number of workers."
    return text


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "".join(f"\n  | {line}" for line in lines[-_LOG_LINES:])


def _explained(failure: Failure, members: Sequence[_Member], silent: Sequence[int]) -> WorkersFailed:
    """The error of the group. Where no rank knows more than that a peer is gone, the silent ones are the suspects."""
    suspects = ""
    if failure.peer_lost and silent:
        suspects = f"\nNot a word came from rank {', '.join(map(str, silent))}: stopped, or hanging."
    text = f"worker {failure.rank} failed: {failure.text}{suspects}\nIts log: {members[failure.rank].log}"
    cause: Cause = "died" if failure.peer_lost else failure.cause
    traceback = None if failure.peer_lost else failure.traceback
    return WorkersFailed(text, rank=failure.rank, cause=cause, traceback=traceback)
