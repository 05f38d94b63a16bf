"""Ctrl-C and SIGTERM: the first asks for a graceful stop, the second stops at once."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """Catches SIGINT and SIGTERM inside its ``with`` block. The second one raises ``KeyboardInterrupt``."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
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
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
