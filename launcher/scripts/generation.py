"""One generation: all ranks of a job from their start until every process of theirs is gone."""

import os
import selectors
import signal
import time
from collections.abc import Callable, Mapping
from typing import Literal

from evermesh.fault.recorder.area import RingArea
from evermesh.fault.recorder.in_scripts import environment_of
from evermesh.launcher.scripts.environment import Start, rank_environment
from evermesh.launcher.scripts.nodes import Node, Place, places
from evermesh.launcher.scripts.options import ScriptJob
from evermesh.launcher.scripts.output import Stream, Terminal
from evermesh.launcher.scripts.processes import Guardian, RankProcess
from evermesh.launcher.scripts.report import Ends
from evermesh.launcher.scripts.wakeups import Wakeups

_REAP_TIMEOUT_S = 10.0
"""How long a killed process may take to disappear."""
_LOOK_S = 3600.0
"""Longest sleep of the loop; whatever happens wakes it."""


class Ranks:
    """The processes of one generation on this machine, and what they print.

    ``guardians``: of every node here. ``wakeups`` are taken while the ranks are watched. ``rings``: where ranks record their
    collectives; None: nowhere.
    """

    def __init__(
        self,
        job: ScriptJob,
        start: Start,
        terminal: Terminal,
        guardians: Mapping[Node, Guardian],
        wakeups: Wakeups,
        rings: RingArea | None = None,
    ) -> None:
        self._job, self._start, self._terminal, self._guardians = job, start, terminal, guardians
        self._wakeups, self._rings = wakeups, rings
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeups, selectors.EVENT_READ, None)
        self._processes: list[RankProcess] = []
        self._streams: list[Stream] = []
        self._places = places(start.nodes)
        self._prefixed = sum(self._shows(place, 1) or self._shows(place, 2) for place in self._places) > 1
        self.codes: dict[Place, int] = {}
        """In the order of their ends: exit code, or minus the signal."""
        self.ended_s: dict[Place, float] = {}
        """Monotonic clock."""

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @property
    def ends(self) -> Ends:
        """Every end so far."""
        return tuple((place, self.codes[place], time_s) for place, time_s in self.ended_s.items())

    @property
    def is_over(self) -> bool:
        """Whether every rank that was started has ended."""
        return len(self.codes) == len(self._processes)

    def start_all(self, inherited: Mapping[str, str], is_wanted: Callable[[], bool]) -> None:
        """Start every rank, unless ``is_wanted`` says meanwhile that none is wanted any more."""
        for place in self._places:
            if not is_wanted():
                return
            self._start.folder(place).mkdir(parents=True, exist_ok=True)
            self._start_one(place, inherited)

    def watch(self, until: Callable[[], bool], deadline_s: float | None = None) -> None:
        """Copy output and note ends until ``until`` holds, every rank has ended, or the monotonic clock strikes."""
        while not until() and not self.is_over:
            now_s = time.monotonic()
            if deadline_s is not None and now_s >= deadline_s:
                return
            ready = [key for key, _ in self._selector.select(max(0.0, self._next_s(deadline_s) - now_s))]
            for key in ready:
                if isinstance(key.data, Stream) and not key.data.pump():
                    self._selector.unregister(key.fd)
                elif key.data is None:
                    self._wakeups.take()
            for key in ready:
                if isinstance(key.data, RankProcess):
                    self._note_end(key.data)
            self._release_tracebacks()

    def send(self, number: int) -> None:
        """Send a signal to every rank that still runs."""
        for process in list(self._processes):
            if process.place not in self.codes:
                process.send(number)
                process.send(signal.SIGCONT)  # a stopped process would not hear it

    def kill(self) -> None:
        """Send SIGKILL to every process that belongs to a rank."""
        for process in list(self._processes):
            process.kill_tree()

    def mute(self) -> None:
        """From now on what ranks print goes only into their logs."""
        for stream in self._streams:
            stream.mute()

    def close(self) -> None:
        """End what is left of every rank, and return when it is gone."""
        self.kill()
        self.watch(lambda: False, time.monotonic() + _REAP_TIMEOUT_S)
        gone, self._processes = self._processes, []  # no signal may reach their numbers once they are reaped
        for process in gone:
            process.reap(_REAP_TIMEOUT_S)
            self._guardians[process.place.node].forget(process)
        for stream in self._streams:
            stream.pump()
            stream.close()
        self._selector.close()

    def _start_one(self, place: Place, inherited: Mapping[str, str]) -> None:
        environment = rank_environment(self._job, self._start, place, inherited)
        if self._rings is not None:
            spec = self._rings.spec(self._start.generation, place.rank, place.node.world_size)
            environment |= environment_of(spec, environment)
        stdout, stderr = self._sink(place, 1), self._sink(place, 2)
        try:
            process = RankProcess(place, self._job.command(place.local_rank), environment, stdout=stdout, stderr=stderr)
        finally:
            os.close(stdout)
            os.close(stderr)
        self._guardians[place.node].watch(process)
        self._processes.append(process)
        self._selector.register(process.pidfd, selectors.EVENT_READ, process)

    def _shows(self, place: Place, number: Literal[1, 2]) -> bool:
        return self._job.shows(place.local_rank, number, on_first_node=place.node == self._start.nodes[0])

    def _sink(self, place: Place, number: Literal[1, 2]) -> int:
        """A descriptor that takes a stream of a rank: its log, or a pipe to us where the terminal shows it."""
        log = self._start.folder(place) / ("stdout.log" if number == 1 else "stderr.log")
        if not self._shows(place, number):
            return os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        stream = Stream(self._terminal, place.rank, number, log, f"[{place.rank}] " if self._prefixed else "")
        self._streams.append(stream)
        self._selector.register(stream.reader, selectors.EVENT_READ, stream)
        return stream.writer

    def _next_s(self, deadline_s: float | None) -> float:
        """When to look again, should nothing happen."""
        times = [stream.release_s for stream in self._streams if stream.release_s is not None]
        return min([*times, time.monotonic() + _LOOK_S if deadline_s is None else deadline_s])

    def _release_tracebacks(self) -> None:
        for stream in self._streams:
            if stream.release_s is not None and stream.release_s <= time.monotonic():
                stream.release()

    def _note_end(self, process: RankProcess) -> None:
        code = process.code()
        if code is None:
            return
        self._selector.unregister(process.pidfd)
        self.codes[process.place], self.ended_s[process.place] = code, time.monotonic()
        for stream in self._streams:  # its last words are in the pipe by now
            if stream.rank == process.place.rank:
                stream.pump()
