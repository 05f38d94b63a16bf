"""Ctrl-C, SIGTERM and a lost terminal: the first asks for a graceful stop, the second stops at once."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What asks for the end of a run. They reach the whole process group, but only the launcher answers them."""


class Interrupts:
    """Catches ``SIGNALS`` inside its ``with`` block. The second one raises ``KeyboardInterrupt(number)``.

    SIGHUP stays ignored where it is, as under nohup.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def exit_code(self) -> int:
        """What a process that was stopped by this signal ends with: 130 after Ctrl-C, 0 without a signal."""
        return 128 + self.received if self.received else 0

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt(number)
        self.received = signal.Signals(number)
