"""What signals ask of ``evermesh launch``: the end of the job, a checkpoint, or only to leave it alone."""

import signal
from collections import deque
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What may reach the whole process group of a command; a worker ignores them."""
_CAUGHT = (*SIGNALS, signal.SIGUSR1)


class Interrupts:
    """Collects signals inside its ``with`` block. SIGHUP stays ignored where it is, as under nohup."""

    def __init__(self) -> None:
        self._pending: deque[signal.Signals] = deque()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in _CAUGHT:
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def next(self) -> signal.Signals | None:
        """The oldest signal that nobody has taken yet."""
        return self._pending.popleft() if self._pending else None

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._pending.append(signal.Signals(number))
