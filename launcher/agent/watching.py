"""A thread of the agent that reads the rings of its ranks, from outside, and tells the controller what they do.

It computes little, and never holds up the loop of the agent: what it has to say is posted there.
"""

import contextlib
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from evermesh.launcher.watching.messages import ReadRings

if TYPE_CHECKING:
    from evermesh.launcher.agent.connection_watch import ConnectionWatch
    from evermesh.launcher.agent.ring_watch import RingWatch

WINDOW_S, _BRIEF_S = 0.5, 0.1
"""From window to window, and where a rank stands still: it may hang, and is to be found as soon as that is certain."""
_RANKS_PER_S = 4096
"""That the controller of a large job takes summaries of; for as long as ranks stand still, twice as many."""
_BEGIN_S = 1.0
"""Ranks that start need the processor more than who looks at them."""
_LOOK_S = 5.0
_GROUPS_EVERY = 20
"""Windows, in case that somebody has missed them."""
_END_S = 5.0

Send = Callable[[BaseModel], None]


class Watching:
    """What watches the ranks of a node, one generation after another. ``send`` may be called by any thread."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._watcher: _Watcher | None = None

    def begin(self, generation: int, rings: Mapping[int, Path], world_size: int) -> None:
        """Watch the ranks with these rings, which they make themselves; the ones before are watched no more."""
        self.end()
        if rings:
            self._watcher = _Watcher(generation, rings, world_size / _RANKS_PER_S, self._send)

    def end(self) -> None:
        """The ranks are gone: its thread ends by itself."""
        if self._watcher is not None:
            self._watcher.stopped.set()
        self._watcher = None

    def close(self) -> None:
        """Return when nothing is read any more."""
        watcher = self._watcher
        self.end()
        if watcher is not None:
            watcher.thread.join(_END_S)

    def greet(self) -> None:
        """There is another controller, or the same again: it is to be told all."""
        if self._watcher is not None:
            self._watcher.says_groups = True

    def read(self, order: ReadRings) -> None:
        """Send the controller what it asks for, soon."""
        if self._watcher is not None:
            self._watcher.orders.append(order)


class _Watcher:
    """Of one generation."""

    def __init__(self, generation: int, rings: Mapping[int, Path], least_s: float, send: Send) -> None:
        self._generation, self._rings, self._send = generation, rings, send
        self._usual_s, self._brief_s = max(WINDOW_S, least_s), max(_BRIEF_S, least_s / 2)
        self._window_s = self._usual_s
        self.orders: deque[ReadRings] = deque(maxlen=4)
        self.says_groups = False
        self._windows = 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="watching", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            if not self.stopped.wait(_BEGIN_S) and self._wait_compiled():
                self._watch()
        except Exception as error:  # noqa: BLE001  the boundary: ranks train on, watched by pulse and timeouts alone
            print(f"collectives are not watched: {type(error).__name__}: {error}", flush=True)

    def _wait_compiled(self) -> bool:
        """Whether the loops over records are compiled before ranks end; meanwhile another process compiles them, gently."""
        from evermesh.parallelism.planner.compiling import COMPILED, is_cached

        builder: subprocess.Popen[bytes] | None = None
        while COMPILED and not is_cached("kernels"):
            if builder is None:
                command = [sys.executable, "-m", "evermesh.fault.detectors", "--gently"]
                builder = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
            if self.stopped.wait(_LOOK_S):
                return False
            builder.poll()  # whoever comes next needs it too: it is not ended
        return True

    def _watch(self) -> None:
        from evermesh.launcher.agent.connection_watch import ConnectionWatch
        from evermesh.launcher.agent.ring_watch import RingWatch

        connections = ConnectionWatch(self._generation)
        began_s, used_s = time.monotonic(), time.thread_time()
        with contextlib.closing(RingWatch(self._generation, self._rings)) as watch:
            while not self.stopped.wait(self._pause_s()):
                self._look(watch, connections)
        spent_s, lasted_s = time.thread_time() - used_s, time.monotonic() - began_s
        print(f"watching took {spent_s:.3f} s of a processor in {lasted_s:.1f} s", flush=True)

    def _look(self, watch: "RingWatch", connections: "ConnectionWatch") -> None:
        self._windows += 1
        says_groups = self.says_groups or self._windows % _GROUPS_EVERY == 0
        self.says_groups = False
        window = watch.window(says_groups=says_groups)
        self._send(window)
        self._window_s = self._brief_s if watch.stands_still else self._usual_s
        pids = {one.tail.rank: one.tail.pid for one in window.summaries if one.tail.process is not None}
        if (told := connections.look(pids, says_ends=says_groups)) is not None:
            self._send(told)
        while self.orders and not self.stopped.is_set():
            watch.answer(self.orders.popleft(), self._send)

    def _pause_s(self) -> float:
        """To the next whole window on the clock on the wall, so that all agents look at about the same moment."""
        return self._window_s - time.time() % self._window_s
