"""The one thread of an agent: sleeps until a descriptor is ready, a time has come, or another thread has work for it."""

import heapq
import itertools
import os
import selectors
import time
from collections import deque
from collections.abc import Callable


class Loop:
    """Calls functions when descriptors become readable and when times come. Not thread-safe, but for ``post``."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._posted: deque[Callable[[], None]] = deque()
        self._reader, self.wakeup_fd = os.pipe()
        """``wakeup_fd``: writing a byte to it ends the sleep, also from a signal handler."""
        for descriptor in (self._reader, self.wakeup_fd):
            os.set_blocking(descriptor, False)
        self.on_readable(self._reader, self._drain)

    def on_readable(self, descriptor: int, call: Callable[[], None]) -> None:
        """Call ``call`` whenever ``descriptor`` is readable, until it is forgotten."""
        self._selector.register(descriptor, selectors.EVENT_READ, call)

    def forget(self, descriptor: int) -> None:
        """Watch ``descriptor`` no more; nothing happens if it is not watched."""
        if descriptor in self._selector.get_map():
            self._selector.unregister(descriptor)

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Call ``call`` once, in ``delay_s`` seconds."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._numbers), call))

    def post(self, call: Callable[[], None]) -> None:
        """Call ``call`` soon. Any thread may use this."""
        self._posted.append(call)
        self.wake()

    def wake(self) -> None:
        """End the sleep. Any thread, and a signal handler, may use this."""
        try:
            os.write(self.wakeup_fd, b"x")
        except BlockingIOError:
            return  # it is awake already

    def run_until(self, is_over: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Serve until ``is_over`` holds (asked after every call) or the time is up; returns what it says then."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not is_over():
            if deadline_s is not None and time.monotonic() >= deadline_s:
                return False
            self._serve(deadline_s)
        return True

    def close(self) -> None:
        """Give the descriptors back."""
        self._selector.close()
        os.close(self._reader)
        os.close(self.wakeup_fd)

    def _serve(self, deadline_s: float | None) -> None:
        for key, _ in self._selector.select(self._sleep_s(deadline_s)):
            if key.fd in self._selector.get_map():  # an earlier call of this round may have forgotten it
                key.data()
        while self._posted:
            self._posted.popleft()()
        while self._timers and self._timers[0][0] <= time.monotonic():
            heapq.heappop(self._timers)[2]()

    def _sleep_s(self, deadline_s: float | None) -> float | None:
        times = [time_s for time_s in (deadline_s, self._timers[0][0] if self._timers else None) if time_s is not None]
        return max(0.0, min(times) - time.monotonic()) if times else None

    def _drain(self) -> None:
        try:
            os.read(self._reader, 4096)
        except BlockingIOError:
            return
