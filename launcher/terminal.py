"""Where a command prints: tables that keep what is copied in one piece, and an output whose end does not end a run."""

import os
import sys
from typing import IO, Any, TextIO, cast

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

_ANY_WIDTH = 10_000


def lasting_console() -> Console:
    """Standard output for as long as somebody takes it: when ``| head`` or a terminal is gone, a run goes on without."""
    return Console(file=cast(IO[str], _Lasting(sys.stdout)))


def print_table(table: Table) -> None:
    """Print ``table`` without folding paths and names: on a narrow terminal the terminal breaks its lines."""
    console = Console()
    wanted = Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).maximum
    Console(width=max(console.width, wanted)).print(table)


class _Lasting:
    """A text stream that swallows everything after its first error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Send this stream nowhere, with what it still holds: Python flushes it once more when it ends."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
