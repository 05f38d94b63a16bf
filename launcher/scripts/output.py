"""What ranks print: all of it in log files, some of it on the terminal, line by line."""

import os
import select
import time
from pathlib import Path
from typing import BinaryIO, Literal

_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 16
"""Bytes after which an unfinished line is printed anyway."""
_SLOW_READER_S = 1.0
_MARK = b"Traceback (most recent call last):"
_HOLD_S = 2.0
"""How long a traceback waits for the death that it announces."""


class Terminal:
    """The launcher's own output. After its first error it swallows everything: a lost reader ends no job."""

    def __init__(self) -> None:
        self._lost: set[int] = set()

    def write(self, descriptor: int, content: bytes) -> None:
        """Write everything, or nothing more if nobody reads."""
        view = memoryview(content)
        while view and descriptor not in self._lost:
            try:
                view = view[os.write(descriptor, view) :]
            except BlockingIOError:  # whoever made it non-blocking reads slowly
                select.select([], [descriptor], [], _SLOW_READER_S)
            except OSError:
                self._lost.add(descriptor)

    def say(self, text: str) -> None:
        """Print lines of our own, among the errors."""
        self.write(2, f"{text}\n".encode())


class Stream:
    """One stream of one rank that the terminal shows: a pipe, copied to its log and, by lines, to the terminal.

    A traceback is held back for a while: if ranks are dying, the report tells the one that matters, and only that.
    """

    def __init__(self, terminal: Terminal, rank: int, number: Literal[1, 2], log: Path, prefix: str) -> None:
        self.rank = rank
        self._terminal, self._number, self._prefix = terminal, number, prefix.encode()
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self._log: BinaryIO | None = log.open("wb", buffering=0)
        self._line = b""
        self._traceback = b""
        self.release_s: float | None = None
        """Monotonic clock: when to show what is held back; None while nothing is."""
        self._is_muted = False

    def mute(self) -> None:
        """From now on, and what is held back, goes only into the log."""
        self._is_muted, self._line, self._traceback, self.release_s = True, b"", b"", None

    def release(self) -> None:
        """Show what was held back."""
        held, self._traceback, self.release_s = self._traceback, b"", None
        self._print(held)

    def pump(self) -> bool:
        """Copy what is there; False when no more can come."""
        while True:
            try:
                content = os.read(self.reader, _CHUNK)
            except BlockingIOError:
                return True
            if not content:
                return False
            self._keep(content)
            self._show(content)

    def close(self) -> None:
        """Show the last, unfinished line, and close pipe and log."""
        self.release()
        if self._line:
            self._terminal.write(self._number, self._prefix + self._line + b"\n")
        os.close(self.reader)
        if self._log:
            self._log.close()

    def _keep(self, content: bytes) -> None:
        try:
            if self._log:
                self._log.write(content)
        except OSError as error:  # a full disk must not stop what the ranks do
            self._terminal.say(f"evermesh: the log {self._log.name if self._log else ''} ends here: {error.strerror}")
            self._log = None

    def _show(self, content: bytes) -> None:
        if self._is_muted:
            return
        if self.release_s is not None:
            self._traceback += content
            return
        found = content.find(_MARK) if self._number == 2 else -1
        if found >= 0:
            start = content.rfind(b"\n", 0, found) + 1
            content, self._traceback = content[:start], content[start:]
            self.release_s = time.monotonic() + _HOLD_S
        self._print(content)

    def _print(self, content: bytes) -> None:
        if not self._prefix:
            self._terminal.write(self._number, content)
            return
        self._line += content.replace(b"\r\n", b"\n")
        ended = max(self._line.rfind(b"\n"), self._line.rfind(b"\r")) + 1  # progress bars end lines with \r
        if not ended and len(self._line) > _LONGEST_LINE:
            ended = len(self._line)
        lines, self._line = self._line[:ended], self._line[ended:]
        shown = [line if line in (b"\n", b"\r") else self._prefix + line for line in lines.splitlines(keepends=True)]
        self._terminal.write(self._number, b"".join(shown))
