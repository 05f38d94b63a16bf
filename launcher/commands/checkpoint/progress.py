"""A bar of bytes while a checkpoint is read or written, on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


@contextmanager
def bytes_bar(text: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """What is to be told of bytes as they are done; shown on standard error if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(text, total=total_bytes)
        yield lambda num_bytes: progress.advance(task, num_bytes)


def megabytes(num_bytes: int) -> str:
    """``1,234.5 MB``."""
    return f"{num_bytes / 1e6:,.1f} MB"
