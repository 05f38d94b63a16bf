"""Signals while a script runs: passed on to its ranks at once, and remembered."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
"""Passed on; the ranks then have the grace of the job to end."""
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Passed on, and that is all."""


class Signals:
    """Catches signals inside its block. What is ignored when we start stays ignored, as under nohup.

    ``pass_on`` and ``kill`` are called here and now: the loop may be waiting for a terminal that takes no output.
    """

    def __init__(self, pass_on: Callable[[int], None], kill: Callable[[], None]) -> None:
        self._pass_on, self._kill = pass_on, kill
        self.stopped_by: signal.Signals | None = None
        """The first one that asked for the end."""
        self.stopped_s = 0.0
        """Monotonic clock: when it came."""
        self.forwarded: set[int] = set()
        """Those that ask for nothing."""
        self.is_killed = False
        """A second one asked for the end, at once."""
        self._has_stopped = False
        """One came to this process: schedulers send the first to all machines, and that is not a second one."""

    def __enter__(self) -> Self:
        self.reader, self._writer = os.pipe()
        for descriptor in (self.reader, self._writer):
            os.set_blocking(descriptor, False)
        caught = [number for number in (*ENDING, *PASSED_ON) if signal.getsignal(number) is not signal.SIG_IGN]
        self._before: dict[signal.Signals, Any] = {number: signal.signal(number, self._take) for number in caught}
        self._old_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self.reader)
        os.close(self._writer)

    def drain(self) -> None:
        """Empty ``reader``, which becomes readable with every signal."""
        os.read(self.reader, 4096)

    def stop(self, number: int) -> None:
        """Pass on a signal that asks for the end, unless one came before; also when it came to another machine."""
        if self.stopped_by is None:
            self.stopped_by, self.stopped_s = signal.Signals(number), time.monotonic()
            self._pass_on(number)

    def kill(self) -> None:
        """End at once."""
        self.is_killed = True
        self._kill()

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number in PASSED_ON:
            self.forwarded.add(number)
            self._pass_on(number)
        elif not self._has_stopped:
            self._has_stopped = True
            self.stop(number)
        else:
            self.kill()
