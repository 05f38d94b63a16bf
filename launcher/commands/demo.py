"""``evermesh demo``."""

from pathlib import Path
from typing import Annotated

import typer

from evermesh.launcher.commands.jobs import Runs

EXAMPLES = """[bold]Example[/]

  evermesh demo

Trains a small model on the Python standard library with 4 workers, saves and stops.

Then resumes on 3 workers, and checks what is written down about every step.

It takes at most 3 minutes on two cores; exit code 1 if a check fails."""


def demo(
    runs: Runs = Path("runs"),
    workers: Annotated[int, typer.Option("--resume-workers", min=1, help="Workers of the second half.")] = 3,
) -> None:
    """Train, save, stop, and resume on another number of workers; check the result."""
    from evermesh.launcher.demo import run_demo
    from evermesh.launcher.terminal import lasting_console

    raise typer.Exit(run_demo(lasting_console(), runs=runs, resume_workers=workers))
