"""Runs a script to its end: starts the ranks, passes signals on, carries out what the policy decides."""

import os
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from evermesh.launcher.scripts.environment import Start
from evermesh.launcher.scripts.generation import Ranks
from evermesh.launcher.scripts.options import ScriptJob
from evermesh.launcher.scripts.output import Terminal
from evermesh.launcher.scripts.policy import (
    DO_NOT_REQUEUE,
    REQUEUE,
    Again,
    Failure,
    Finish,
    Generation,
    Observation,
    Progress,
    decide,
    root_cause,
)
from evermesh.launcher.scripts.processes import Guardian, held_port
from evermesh.launcher.scripts.report import read_failure, told

if TYPE_CHECKING:
    from evermesh.fault.events import EventLog

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
"""Passed on; the ranks then have the grace of the job to end."""
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Passed on, and that is all."""
_FAILURE_GRACE_S = 5.0
"""At most so long do the other ranks get between SIGTERM and SIGKILL after a failure: most wait in a collective."""
_ROOT_CAUSE_WAIT_S = 1.0
"""After a rank lost its peer: how long the peer has to show why."""


class Supervisor:
    """The launcher's side of one job. ``run`` may be called once, from the main thread."""

    def __init__(self, job: ScriptJob, inherited: Mapping[str, str], terminal: Terminal) -> None:
        self._job, self._inherited, self._terminal = job, inherited, terminal
        self._folder = _log_folder(job)
        self._ranks: Ranks | None = None
        self._generations: list[Generation] = []
        self._progress = Progress()
        self._stopped_by: signal.Signals | None = None
        self._stopped_s = 0.0
        self._forwarded: set[int] = set()
        self._events: EventLog | None = None

    def run(self) -> int:
        """Run generation after generation until the policy says finish; return the exit code. No process is left."""
        self._terminal.say(f"evermesh: {_ranks_in_words(self._job)}; logs in {self._folder}")
        if self._job.idle_flags:
            self._terminal.say(f"evermesh: accepted, without effect on one machine: {', '.join(self._job.idle_flags)}")
        with Guardian() as guardian, self._signals() as wakeup:
            reason = ""
            while True:
                with held_port(self._job.master_port) as port:
                    start = self._next_start(reason, port)
                    self._run_generation(start, guardian, wakeup)
                decision = decide(self._seen())
                if isinstance(decision, Finish):
                    break
                reason = decision.reason
                self._announce(decision)
        self._tell_end(decision, start)
        return decision.exit_code

    def _next_start(self, reason: str, port: int) -> Start:
        generation = len(self._generations)
        folder = self._folder / f"attempt_{generation}"  # as torchrun names it
        return Start(generation, reason, port, folder, self._folder / "progress")

    def _run_generation(self, start: Start, guardian: Guardian, wakeup: int) -> None:
        began_s = time.monotonic()
        self._forwarded.clear()
        ranks = self._ranks = Ranks(self._job, start, self._terminal, guardian, wakeup)
        try:
            ranks.start_all(self._inherited, lambda: self._stopped_by is None)
            if self._stopped_by is not None:
                ranks.send(self._stopped_by)  # one of them was being started when it came
            self._record(
                "started", f"generation {start.generation}", generation=start.generation, pids=list(ranks.pids)
            )
            ranks.watch(lambda: self._stopped_by is not None or any(ranks.codes.values()))
            failures = self._end(start, ranks)
        finally:
            ranks.close()
        self._note(time.monotonic() - began_s, failures)

    def _end(self, start: Start, ranks: Ranks) -> tuple[Failure, ...]:
        """Let all ranks end, after a signal or a failure, and return the failures that nothing of ours caused."""
        if self._stopped_by is None and any(ranks.codes.values()):
            ranks.mute()  # what the others print now is only a consequence
            self._wait_for_root_cause(start, ranks)
        failures = _failures(start, ranks)
        for failure in failures if self._stopped_by is None else ():
            self._record("died", f"rank {failure.rank} {failure.how}", rank=failure.rank, code=failure.code)
        if self._stopped_by is None:
            ranks.send(signal.SIGTERM)
            ranks.watch(lambda: False, time.monotonic() + min(_FAILURE_GRACE_S, self._job.grace_s))
            return failures
        ranks.watch(lambda: False, self._stopped_s + self._job.grace_s)
        return _failures(start, ranks)

    def _wait_for_root_cause(self, start: Start, ranks: Ranks) -> None:
        """Other ranks may be about to say why, or to finish what a rank that asks for a requeue has finished."""
        first = root_cause(_failures(start, ranks))
        if first.code in (REQUEUE, DO_NOT_REQUEUE):
            ranks.watch(lambda: self._stopped_by is not None, time.monotonic() + self._job.grace_s)
        elif first.is_lost_peer:
            deadline_s = time.monotonic() + _ROOT_CAUSE_WAIT_S
            ranks.watch(lambda: not root_cause(_failures(start, ranks)).is_lost_peer, deadline_s)

    def _note(self, ran_s: float, failures: tuple[Failure, ...]) -> None:
        now = _read_progress(self._folder / "progress")
        reported = now.is_beyond(self._progress)
        if reported:
            step = self._progress.step if now.step is None else now.step
            self._progress = Progress(now.time_ns, step)
        self._generations.append(Generation(ran_s, failures, reported, self._progress.time_ns is not None))

    def _seen(self) -> Observation:
        return Observation(
            tuple(self._generations), self._job.max_restarts, self._stopped_by, frozenset(self._forwarded)
        )

    def _announce(self, again: Again) -> None:
        generation = len(self._generations)
        self._terminal.say(f"evermesh: {again.reason}. All ranks start again: generation {generation}.")
        self._record("restarted", again.reason, generation=generation)

    def _tell_end(self, finish: Finish, start: Start) -> None:
        self._record("finished", finish.reason, exit_code=finish.exit_code)
        failures = self._generations[-1].failures
        is_only_failure = finish.exit_code == 1 and not self._job.max_restarts  # what follows says it all
        if finish.exit_code and not is_only_failure:
            self._terminal.say(f"evermesh: {finish.reason}.")
        if finish.exit_code in (1, DO_NOT_REQUEUE) and failures:
            self._terminal.say(told(root_cause(failures), start))

    @contextmanager
    def _signals(self) -> Iterator[int]:
        """Catch signals inside the block; yield a descriptor that becomes readable with each.

        What is ignored when we start stays ignored, as under nohup.
        """
        reader, writer = os.pipe()
        for descriptor in (reader, writer):
            os.set_blocking(descriptor, False)
        caught = [number for number in (*ENDING, *PASSED_ON) if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._take) for number in caught}
        old_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(old_wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(reader)
            os.close(writer)

    def _take(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on here and now: the loop may be waiting for a terminal that takes no output."""
        if number in PASSED_ON:
            self._forwarded.add(number)
        elif self._stopped_by is not None:
            if self._ranks:
                self._ranks.kill()
            return
        else:
            self._stopped_by, self._stopped_s = signal.Signals(number), time.monotonic()
        if self._ranks:
            self._ranks.send(number)

    def _record(self, kind: str, text: str, **fields: Any) -> None:
        """Append to the event log; a log that cannot be written is said, and ends no job."""
        from evermesh.fault.events import EventLog  # only now: the ranks are running already

        try:
            if self._events is None:
                self._events = EventLog(self._folder / "events.jsonl")
            self._events.write(kind, text, **fields)
        except OSError as error:
            self._terminal.say(f"evermesh: {error}")


def _failures(start: Start, ranks: Ranks) -> tuple[Failure, ...]:
    ended = ranks.ended_s.items()
    return tuple(read_failure(start, rank, ranks.codes[rank], time_s) for rank, time_s in ended if ranks.codes[rank])


def _log_folder(job: ScriptJob) -> Path:
    if job.log_dir is None:
        return Path(tempfile.mkdtemp(prefix="evermesh-"))
    job.log_dir.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{job.run_id}_", dir=job.log_dir.absolute()))


def _ranks_in_words(job: ScriptJob) -> str:
    return f"{job.workers} rank{'s' if job.workers > 1 else ''} of {job.name}"


def _read_progress(file: Path) -> Progress:
    try:
        time_ns, text = file.stat().st_mtime_ns, file.read_text(errors="replace")[:32].strip()
    except FileNotFoundError:
        return Progress()
    return Progress(time_ns, int(text) if text.isdecimal() else None)
