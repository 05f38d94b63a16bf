"""What is injected from outside the ranks: signals, full file systems, ways that are cut or bad. A thread beside the job."""

import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
from pydantic import ValidationError

from evermesh.fault.errors import EventLogUnusable
from evermesh.fault.events import Event
from evermesh.fault.injection import AfterSeconds, AtStep, Cut, Delay, Fill, Injection, Kill, Shot, Stop
from evermesh.fault.injection.telling import INJECTED, tell
from evermesh.launcher.chaos.ballast import Ballast
from evermesh.launcher.chaos.victims import victims
from evermesh.launcher.chaos.way import Way
from evermesh.launcher.controller.journal import Entry
from evermesh.launcher.errors import RunNotFound
from evermesh.launcher.lines import Lines
from evermesh.launcher.run_directory import Run
from evermesh.runtime.telemetry import StepReport

_LOOK_S = 0.02


class Conductor:
    """Fires the shots of ``injection`` that no rank fires at itself, and ends what lasts. A context manager.

    When it is left, or somebody asks the job to stop, everything that lasts is undone: stopped processes go on, files that
    fill a disk are gone.
    """

    def __init__(self, run: Run, injection: Injection) -> None:
        self._run = run
        self._shots = {shot.number: shot for shot in injection.shots}
        self._left = [shot for shot in injection.shots if not shot.is_inside]
        self._steps, self._events, self._journal = (
            Lines(path, from_start=True) for path in (run.telemetry, run.events, run.journal)
        )
        self._step = 0
        self._began_s: float | None = None
        self._due: list[Shot] = []
        self._undo: list[tuple[float, Callable[[], None]]] = []
        """Monotonic clock, and what ends something that lasts."""
        self._ways = {name: Way(run, name) for name in sorted(set(map(_node_of_way, self._left))) if name}
        self._is_withdrawn = False
        self.asked_launcher = False
        """A shot has asked who shows the job for its end."""
        self.controllers: list[tuple[float, int]] = []
        """Wall clock and process of every controller that was seen."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="conductor", daemon=True)

    def __enter__(self) -> "Conductor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()
        self._withdraw()
        for way in self._ways.values():
            way.close()

    def _serve(self) -> None:
        while not self._closed.wait(_LOOK_S):
            self._note_controller()
            self._take_steps()
            self._take_events()
            self._take_requests()
            for shot in self._due.copy():
                self._fire(shot)
            self._undo_due(time.monotonic())

    def _note_controller(self) -> None:
        with suppress(RunNotFound, OSError):
            pid = self._run.state().pid
            if pid is not None and (not self.controllers or self.controllers[-1][1] != pid):
                self.controllers.append((time.time(), pid))

    def _take_steps(self) -> None:
        """Find out which shots are due by now: those for a step when it is finished, once each time it is."""
        for line in self._steps.new():
            self._step = StepReport.from_json(line).step
            self._began_s = self._began_s or time.monotonic()
            self._due += self._next(lambda shot: isinstance(shot.at, AtStep) and shot.at.step == self._step)
        if self._began_s is not None:
            since_s = time.monotonic() - self._began_s
            self._due += self._next(lambda shot: isinstance(shot.at, AfterSeconds) and shot.at.seconds <= since_s)

    def _next(self, is_due: Callable[[Shot], bool]) -> list[Shot]:
        """Take the shots that are due; of a fault that happens several times only one per victim."""
        found: dict[tuple[int, str], Shot] = {}
        for shot in self._left:
            if is_due(shot):
                found.setdefault((shot.of_fault, str(shot.victim)), shot)
        self._left = [shot for shot in self._left if shot not in found.values()]
        return list(found.values())

    def _take_events(self) -> None:
        """A rank that stopped itself is to go on some time later."""
        for line in self._events.new():
            with suppress(ValidationError, psutil.NoSuchProcess):
                event = Event.model_validate_json(line)
                shot = self._shots.get(int(str(event.fields.get("shot", -1)))) if event.kind == INJECTED else None
                if shot is not None and shot.is_inside and isinstance(shot.fault, Stop):
                    self._continue_later([psutil.Process(int(str(event.fields["pid"])))], shot.fault)

    def _take_requests(self) -> None:
        for line in self._journal.new():
            entry = Entry.model_validate_json(line)
            if entry.kind == "stop" and not self.asked_launcher:
                self._is_withdrawn = True
                self._withdraw()

    def _fire(self, shot: Shot) -> None:
        """Inject it, unless its victim is just being started: then the next time."""
        if self._is_withdrawn:
            self._due.remove(shot)
            return
        found = victims(self._run, shot.victim) if shot.victim is not None else []
        if shot.victim is not None and not found:
            return
        self._due.remove(shot)
        try:
            tell(self._run.events, shot, self._step, found[0].pid if found else None)
        except EventLogUnusable:
            return  # the report says that it was not injected
        fault = shot.fault
        if isinstance(fault, Kill):
            self.asked_launcher = self.asked_launcher or (shot.victim is not None and shot.victim.of == "launcher")
            _send(found, signal.Signals[fault.signal])
        elif isinstance(fault, Stop):
            _send(found, signal.SIGSTOP)
            self._continue_later(found, fault)
        elif isinstance(fault, Cut):
            way = self._ways[_node_of_way(shot)]
            way.cut()
            self._undo.append((time.monotonic() + fault.for_s, way.mend))
        elif isinstance(fault, Delay):
            way = self._ways[_node_of_way(shot)]
            way.worsen(fault)
            self._undo.append((time.monotonic() + fault.for_s, lambda: way.worsen(None)))
        elif isinstance(fault, Fill):
            ballast = Ballast(fault, self._run.directory)
            self._undo.append((time.monotonic() + fault.for_s, ballast.remove))

    def _continue_later(self, stopped: list[psutil.Process], fault: Stop) -> None:
        after_s = fault.continue_after_s or float("inf")  # what never goes on does so when this is over
        self._undo.append((time.monotonic() + after_s, lambda: _send(stopped, signal.SIGCONT)))

    def _undo_due(self, now_s: float) -> None:
        due = [undo for until_s, undo in self._undo if until_s <= now_s]
        self._undo = [one for one in self._undo if one[0] > now_s]
        for undo in due:
            undo()

    def _withdraw(self) -> None:
        self._undo_due(float("inf"))


def _node_of_way(shot: Shot) -> str:
    """Name of the node whose way to the controller is cut or bad; empty for other faults."""
    return f"node-{shot.victim.which}" if isinstance(shot.fault, Cut | Delay) and shot.victim is not None else ""


def _send(processes: list[psutil.Process], number: signal.Signals) -> None:
    """Send a signal to all that still live; psutil knows a process from a later one of the same number."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)
