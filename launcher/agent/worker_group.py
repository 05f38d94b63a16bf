"""The workers of one node in one generation: started from the warm process, watched, ended together."""

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from evermesh.fault.process_state import ProcessState
from evermesh.fault.recorder.area import RingArea
from evermesh.fault.snapshot.remote import Keepers
from evermesh.launcher.agent.loop import Loop
from evermesh.launcher.agent.standby import Standbys
from evermesh.launcher.agent.worker import WorkerSpec
from evermesh.launcher.messages import Outcome, Place, Store, TrainingWork
from evermesh.launcher.policy import Failure

_STACKS_WAIT_S = 1.0
"""How long workers get at most to write down what they are doing before they are ended; it takes milliseconds."""
_STACKS_LOOK_S = 0.005
_END_WAIT_S = 10.0
"""How long a killed process may take to disappear."""
_LOG_LINES = 8


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a group tells its agent."""

    changed: Callable[[], None]
    """A rank is done, failed or gone."""
    reported: Callable[[dict[str, Any]], None]
    planned: Callable[[dict[str, Any]], None]
    expected: Callable[[dict[str, Any]], None]
    """What plans expect of ranks."""


@dataclass(slots=True, eq=False)
class _Member:
    rank: int
    process: BaseProcess
    pipe: connection.Connection
    log: Path
    is_gone: bool = False
    """The process is reaped and its pipe is empty."""


class WorkerGroup:
    """The local ranks of one generation. Every method is called from the loop's thread."""

    def __init__(self, loop: Loop, generation: int, place: Place, logs: Path, hooks: Hooks, standbys: Standbys) -> None:
        self.generation, self.place, self._standbys = generation, place, standbys
        self._loop, self._logs, self._hooks = loop, logs, hooks
        self._members: list[_Member] = []
        self._done: dict[int, dict[str, Any]] = {}
        self._failures: list[Failure] = []
        self._is_ending = False
        self.rings: dict[int, Path] = {}
        """By rank that records."""
        self.fresh_because: str | None = None
        """Why the workers are fresh interpreters; None: they are forks of the warm process."""

    @property
    def outcome(self) -> Outcome:
        """What became of the ranks so far."""
        is_over = all(member.is_gone for member in self._members)
        return Outcome(generation=self.generation, done=self._done, failures=tuple(self._failures), is_over=is_over)

    @property
    def pids(self) -> dict[int, int]:
        """Process of every living rank."""
        return {
            member.rank: member.process.pid for member in self._members if member.process.pid and not member.is_gone
        }

    def start(
        self,
        store: Store,
        work: TrainingWork,
        board: Path | None,
        settings: dict[str, str],
        keeper: Path | None = None,
        keepers: Keepers | None = None,
        rings: RingArea | None = None,
    ) -> None:
        """Start every rank of this node; ``keeper`` is where they leave snapshots, ``keepers`` where they find others, and
        ``rings`` where they record their collectives."""
        self._logs.mkdir(parents=True, exist_ok=True)
        for local_rank in range(self.place.ranks):
            rank = self.place.first_rank + local_rank
            spec = WorkerSpec(
                rank=rank,
                local_rank=local_rank,
                world_size=self.place.world_size,
                local_world_size=self.place.ranks,
                node_rank=self.place.node_rank,
                generation=self.generation,
                store=(store.host, store.port),
                settings=settings,
                log=str(self._log(rank)),
                board=str(board) if board else None,
                entry=work.entry,
                arguments=work.arguments,
                keeper=str(keeper) if keeper else None,
                keepers=keepers,
                ring=rings.spec(self.generation, rank, self.place.world_size) if rings else None,
            )
            if spec.ring is not None:
                self.rings[rank] = spec.ring.path
            self._members.append(self._start_one(spec))

    def ask(self, what: str) -> None:
        """Ask all workers to save, to save and return, or to regroup; which of them listens is their business."""
        self._send_all({"kind": what})

    def change_layout(self, changes: dict[str, Any]) -> None:
        """Ask all workers likewise to go on with these changes to their layout."""
        self._send_all({"kind": "change layout", "changes": changes})

    def change_speeds(self, speeds: dict[int, float]) -> None:
        """Tell all workers how fast ranks are; the one that plans counts with it."""
        self._send_all({"kind": "speeds", "speeds": speeds})

    def give_up(self, rank: int, how: str) -> None:
        """End every worker, because the attempt cannot go on and nobody else can say so; ``rank`` is not to blame."""
        self._fail(Failure(rank=rank, time_s=time.monotonic(), how=how, cause="froze", peer_lost=True))
        self.end(how)

    def end(self, stacks_because: str | None = None) -> None:
        """End every worker; ``changed`` tells when they are gone. What failed from now on is our doing."""
        if self._is_ending:
            return
        self._is_ending = True
        if stacks_because is None:
            self.kill()
        else:
            before = self.write_stacks(stacks_because, wakes=True)
            self._kill_after_stacks(before, time.monotonic() + _STACKS_WAIT_S)

    def write_stacks(self, because: str, *, wakes: bool = False) -> dict[int, int]:
        """Have every living worker append what it is doing to ``rank-N.stacks``; by rank the size of the file before.

        One that is stopped does so only where it may go on (``wakes``), because it is about to be ended.
        """
        sizes = {}
        for member in self._members:
            if member.is_gone or member.process.pid is None:
                continue
            state = ProcessState.of(member.process.pid)
            if state is None or state.is_held or (state.is_stopped and not wakes):
                continue
            head = f"\n{datetime.now():%Y-%m-%d %H:%M:%S} generation {self.generation}, rank {member.rank}: {because}\n"
            with member.log.with_suffix(".stacks").open("a") as stacks:
                stacks.write(head)
                stacks.flush()
                sizes[member.rank] = stacks.tell()
            with suppress(ProcessLookupError):  # the warm process reaps it: its end may not have been noted yet
                os.kill(member.process.pid, signal.SIGUSR1)
                if state.is_stopped:  # it takes the signal before it does anything else
                    os.kill(member.process.pid, signal.SIGCONT)
        return sizes

    def kill(self) -> None:
        """End every worker at once, stopped ones too."""
        for member in self._members:
            if not member.is_gone:
                member.process.kill()

    def _send_all(self, message: dict[str, Any]) -> None:
        for member in self._members:
            if not member.is_gone:
                _send(member.pipe, message)

    def _kill_after_stacks(self, before: dict[int, int], deadline_s: float, last: dict[int, int] | None = None) -> None:
        """Kill once the file of every living rank has grown and grows no more, or at the deadline."""
        living = self.pids.keys() & before.keys()
        now = {rank: self._log(rank).with_suffix(".stacks").stat().st_size for rank in living}
        is_written = now == last and all(now[rank] > before[rank] for rank in living)
        if is_written or not living or time.monotonic() >= deadline_s:
            self.kill()
        else:
            self._loop.after(_STACKS_LOOK_S, lambda: self._kill_after_stacks(before, deadline_s, now))

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank-{rank}.log"

    def wait_gone(self) -> None:
        """Return when every process has disappeared."""
        for member in self._members:
            member.process.join(_END_WAIT_S)

    def _start_one(self, spec: WorkerSpec) -> _Member:
        process, pipe, fresh_because = self._standbys.start(spec)
        self.fresh_because = self.fresh_because or fresh_because
        member = _Member(spec.rank, process, pipe, Path(spec.log))
        self._loop.on_readable(pipe.fileno(), lambda: self._drain(member))
        self._loop.on_readable(process.sentinel, lambda: self._note_end(member))
        return member

    def _drain(self, member: _Member) -> None:
        try:
            while member.pipe.poll():
                self._take(member, json.loads(member.pipe.recv_bytes()))
        except (EOFError, OSError):
            self._loop.forget(member.pipe.fileno())  # its end is noted when the process is reaped

    def _take(self, member: _Member, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "report":
            self._hooks.reported(message["values"])
        elif kind == "plan":
            self._hooks.planned(message["values"])
        elif kind == "work":
            self._hooks.expected(message["values"])
        elif kind == "done":
            self._done[member.rank] = message["result"] or {}
            self._hooks.changed()
        else:
            self._fail(_told_failure(member.rank, message))

    def _note_end(self, member: _Member) -> None:
        if member.is_gone:
            return
        self._drain(member)
        member.process.join(_END_WAIT_S)
        self._loop.forget(member.process.sentinel)
        self._loop.forget(member.pipe.fileno())
        member.pipe.close()
        member.is_gone = True
        told = member.rank in self._done or any(failure.rank == member.rank for failure in self._failures)
        if told or self._is_ending:
            self._hooks.changed()
        else:
            self._fail(_silent_failure(member))

    def _fail(self, failure: Failure) -> None:
        if not self._is_ending:
            self._failures.append(failure)
        self._hooks.changed()


def _send(pipe: connection.Connection, message: dict[str, Any]) -> None:
    try:
        pipe.send_bytes(json.dumps(message).encode())
    except OSError:
        return  # it is gone, which its sentinel tells


def _told_failure(rank: int, message: dict[str, Any]) -> Failure:
    """Of a rank that told its exception. An expected error names the way out, its traceback would only hide that."""
    expected = message["expected"]
    text = message["text"] if expected else f"{message['error']}: {message['text']}"
    return Failure(
        rank=rank,
        time_s=message["time_s"],
        how=f"failed: {text}",
        cause="refused" if expected and not message["peer_lost"] else "raised",
        peer_lost=message["peer_lost"],
        text="" if expected else message["traceback"],
        has_traceback=not expected,
    )


def _silent_failure(member: _Member) -> Failure:
    """Of a rank that ended without a word."""
    code = member.process.exitcode
    how = f"ended without a word (exit code {code})"
    if code is not None and code < 0:
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
    return Failure(
        rank=member.rank, time_s=time.monotonic(), how=how, cause="died", code=code, text=_last_lines(member.log)
    )


def _last_lines(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return "\n".join(lines[-_LOG_LINES:])
