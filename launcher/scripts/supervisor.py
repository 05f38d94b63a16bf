"""Runs a script to its end: starts the ranks, passes signals on, carries out what is decided."""

import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager

from evermesh.fault.recorder.area import RingArea
from evermesh.launcher.policy import DO_NOT_REQUEUE, REQUEUE, root_cause
from evermesh.launcher.registry import register
from evermesh.launcher.scripts.environment import Start
from evermesh.launcher.scripts.generation import Ranks
from evermesh.launcher.scripts.log_folder import LogFolder
from evermesh.launcher.scripts.nodes import Node, number_ranks
from evermesh.launcher.scripts.options import ScriptJob
from evermesh.launcher.scripts.output import Terminal
from evermesh.launcher.scripts.peers import Alone, Listener, Peers, Report, Verdict
from evermesh.launcher.scripts.preflight import TESTS_S, Look
from evermesh.launcher.scripts.processes import Guardian, held_port
from evermesh.launcher.scripts.report import Ends, failures_of, refusal_of, report_of
from evermesh.launcher.scripts.signals import Signals
from evermesh.launcher.scripts.wakeups import Wakeups
from evermesh.launcher.scripts.where import Machines

_FAILURE_GRACE_S = 5.0
"""At most so long do the other ranks get between SIGTERM and SIGKILL after a failure: most wait in a collective."""
_ROOT_CAUSE_WAIT_S = 1.0
"""After a rank lost its peer: how long the peer has to show why."""
_LOOK_S = 1.0
"""How often to look whether another machine is overdue."""
_KILLED_WAIT_S = 2.0
"""How long the other machines may delay the end that two signals asked for."""


class Supervisor:
    """The launcher's side of one job on one machine. ``run`` may be called once, from the main thread."""

    def __init__(self, job: ScriptJob, inherited: Mapping[str, str], terminal: Terminal) -> None:
        self._job, self._inherited, self._terminal = job, inherited, terminal
        self._logs = LogFolder(job, terminal.say)
        self._ranks: Ranks | None = None
        self._look = Look(job.preflight, self._logs.path)

    def run(self) -> int:
        """Run generation after generation until it is decided to finish; return the exit code. No process is left."""
        self._terminal.say(f"evermesh: {_in_words(self._job)}; logs in {self._logs.path}")
        if self._job.idle_flags:
            self._terminal.say(f"evermesh: accepted, without effect here: {', '.join(self._job.idle_flags)}")
        with (
            register("script", self._job.name, self._logs.path, sys.argv, say=self._terminal.say),
            self._meet() as self._peers,
            self._guard(self._peers.nodes) as self._guardians,
            self._recorded() as self._rings,
            Wakeups() as self._wakeups,
            Signals(self._pass_on, self._kill) as self._signals,
            closing(self._look),
        ):
            self._wakeups.add(self._signals.reader, self._note_signals)
            self._peers.listen(Listener(self._wakeups, self._signals.stop, self._signals.kill))
            return self._run()

    def _run(self) -> int:
        reason = ""
        self._test()
        for generation in itertools.count():
            with held_port(self._job.where.master_port) as port:
                start = Start(generation, reason, self._peers.nodes, port, self._logs.path)
                verdict = self._agree(self._run_generation(start))
            if verdict.exit_code is not None:
                break
            reason = verdict.reason
            self._terminal.say(f"evermesh: {reason}. All ranks start again: generation {generation + 1}.")
            self._logs.record("restarted", reason, generation=generation + 1)
        return self._finish(verdict)

    def _run_generation(self, start: Start) -> Report:
        began_s = time.monotonic()
        self._signals.forwarded.clear()
        ranks = self._ranks = Ranks(self._job, start, self._terminal, self._guardians, self._wakeups, self._rings)
        if self._rings is not None:
            self._rings.clear()
        is_refused = False
        try:
            ranks.start_all(self._inherited, lambda: not self._is_ending)
            if self._job.preflight == "quick" and start.generation == 0:
                self._look.begin(self._wakeups)  # only now: ranks load their libraries meanwhile
            if self._signals.stopped_by is not None:
                ranks.send(self._signals.stopped_by)  # one of them was being started when it came
            text = f"generation {start.generation}"
            self._logs.record("started", text, generation=start.generation, pids=list(ranks.pids))
            ranks.watch(lambda: self._is_ending or any(ranks.codes.values()))
            is_refused = bool(self._look.unfit_because) and not (ranks.pids and ranks.is_over)
            ends = self._end(start, ranks)
        finally:
            ranks.close()
            if self._rings is not None:
                self._rings.keep()
        if is_refused:
            return refusal_of(start, self._look.unfit_because)
        ran_s, progressed = time.monotonic() - began_s, self._logs.has_progressed()
        return report_of(start, ends, ran_s, has_progressed=progressed, forwarded=self._signals.forwarded)

    @property
    def _is_ending(self) -> bool:
        return self._signals.stopped_by is not None or self._peers.is_ending or bool(self._look.unfit_because)

    def _test(self) -> None:
        """With ``--preflight full``: test this machine before its ranks start; a signal ends the waiting."""
        if self._job.preflight != "full":
            return
        self._terminal.say("evermesh: testing this machine")
        until_s = time.monotonic() + TESTS_S
        self._look.begin(self._wakeups)
        while self._look.is_under_way and not self._is_ending and time.monotonic() < until_s:
            self._wakeups.take(_LOOK_S)

    def _end(self, start: Start, ranks: Ranks) -> Ends:
        """Let all ranks end, after a signal or a failure, and return the ends that nothing of ours caused."""
        if any(ranks.codes.values()) and not self._is_ending:
            ranks.mute()  # what the others print now is only a consequence
            self._wait_for_root_cause(start, ranks)
        ends = ranks.ends
        if self._signals.stopped_by is not None:
            ranks.watch(lambda: False, self._signals.stopped_s + self._job.grace_s)
            return ranks.ends
        failures = failures_of(start, ends)
        if failures or self._look.unfit_because:
            self._peers.tell_failure()
        for failure in failures:
            self._logs.record("died", f"rank {failure.rank} {failure.how}", rank=failure.rank, code=failure.code)
        if failures or self._is_ending:
            ranks.mute()
            ranks.send(signal.SIGTERM)
            ranks.watch(lambda: False, time.monotonic() + min(_FAILURE_GRACE_S, self._job.grace_s))
        return ends

    def _wait_for_root_cause(self, start: Start, ranks: Ranks) -> None:
        """Other ranks may be about to say why, or to finish what a rank that asks for a requeue has finished."""
        first = root_cause(failures_of(start, ranks.ends))
        if first.code in (REQUEUE, DO_NOT_REQUEUE):
            ranks.watch(lambda: self._is_ending, time.monotonic() + self._job.grace_s)
        elif first.peer_lost:
            deadline_s = time.monotonic() + _ROOT_CAUSE_WAIT_S
            ranks.watch(lambda: not root_cause(failures_of(start, ranks.ends)).peer_lost, deadline_s)

    def _agree(self, report: Report) -> Verdict:
        """What all launchers of the job do next; signals are heard meanwhile."""
        self._peers.submit(report)
        killed_s: float | None = None
        while (verdict := self._peers.verdict()) is None:
            self._wakeups.take(_LOOK_S)
            if self._signals.is_killed:
                killed_s = killed_s or time.monotonic()
                if time.monotonic() - killed_s > _KILLED_WAIT_S:
                    number = self._signals.stopped_by or signal.SIGTERM
                    return Verdict(exit_code=128 + number, reason="stopped at once; other machines have not answered")
        return verdict

    def _finish(self, verdict: Verdict) -> int:
        """Tell how it ended; a single failure without restarts says it all itself."""
        code = verdict.exit_code or 0
        self._logs.record("finished", verdict.reason, exit_code=code)
        if code and not (code == 1 and not self._job.max_restarts):
            self._terminal.say(f"evermesh: {verdict.reason}.")
        if code in (1, DO_NOT_REQUEUE) and verdict.told:
            self._terminal.say(verdict.told)
        return code

    def _note_signals(self) -> None:
        """Let the other machines know."""
        self._signals.drain()
        if self._signals.stopped_by is not None:
            self._peers.tell_stop(self._signals.stopped_by)
        if self._signals.is_killed:
            self._peers.tell_kill()

    def _pass_on(self, number: int) -> None:
        if self._ranks:
            self._ranks.send(number)

    def _kill(self) -> None:
        if self._ranks:
            self._ranks.kill()

    @contextmanager
    def _meet(self) -> Iterator[Peers]:
        """The other launchers of the job, when all of them have come."""
        where, job = self._job.where, self._job
        if not isinstance(where, Machines):
            yield Alone(number_ranks((job.workers,) * where.nodes), job.max_restarts)
            return
        from evermesh.launcher.scripts.joining import join  # most jobs have one machine

        joined = join(job, where)
        self._job = job.model_copy(update={"run_id": joined.run_id})
        node = joined.peers.nodes[0]
        last = node.first_rank + node.workers - 1
        self._terminal.say(f"evermesh: node {node.number} of {node.count}: ranks {node.first_rank} to {last}")
        try:
            yield joined.peers
        finally:
            joined.peers.close()

    @contextmanager
    def _guard(self, nodes: tuple[Node, ...]) -> Iterator[dict[Node, Guardian]]:
        """A guardian per node."""
        with ExitStack() as stack:
            yield {node: stack.enter_context(Guardian()) for node in nodes}

    @contextmanager
    def _recorded(self) -> Iterator[RingArea | None]:
        """Where the ranks here record their collectives; without room they run all the same."""
        try:
            rings = RingArea(self._logs.path, os.uname().nodename) if self._job.records else None
        except OSError as error:
            self._terminal.say(f"evermesh: collectives are not recorded: {error}")
            rings = None
        try:
            yield rings
        finally:
            if rings is not None:
                rings.close()


def _in_words(job: ScriptJob) -> str:
    ranks = f"{job.workers} rank{'s' if job.workers > 1 else ''} of {job.name}"
    where = job.where
    if not isinstance(where, Machines):
        return f"{where.nodes} nodes here with {ranks} each" if where.nodes > 1 else ranks
    number = f"node {where.node_rank} ({where.node_rank_from})" if where.node_rank is not None else "a node"
    meeting = f"{where.master_addr}:{where.master_port}"
    return f"{ranks} on {number} of {where.nodes}; waiting at {meeting} until all nodes are there"
