"""Opens the corpora of a job and shows how far the preparation of those is that are not there yet."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as FileProgress

from evermesh.runtime.data import Corpus, DataConfig, open_sources

_NAME_WIDTH = 40


@contextmanager
def shown_preparation(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """What ``prepare`` and its callers take as ``progress``: a bar on a terminal, and a word after Ctrl-C."""
    columns = (
        TextColumn("preparing data"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    bar = FileProgress(*columns, console=console, transient=True, disable=not console.is_terminal)
    tasks: list[TaskID] = []

    def show(done: int, total: int, name: str) -> None:
        if not tasks:
            tasks.append(bar.add_task("", total=total))
        bar.update(tasks[0], completed=done, total=total, description=name[-_NAME_WIDTH:])

    try:
        with bar:
            yield show
    except KeyboardInterrupt:
        console.print("[yellow]stopped[/] while preparing data; the same command goes on from there", highlight=False)
        raise


def open_corpora(config: DataConfig, console: Console) -> list[Corpus]:
    """The corpora of a job, prepared now if they are not there yet.

    Raises:
        EvermeshError: of the data.
    """
    with shown_preparation(console) as progress:
        return open_sources(config, progress=progress)
