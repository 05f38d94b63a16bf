"""``evermesh records``: the last collectives of every rank, read from outside."""

from pathlib import Path
from typing import Annotated

import typer

from evermesh.launcher.commands.watching import Job, Runs

EXAMPLES = """[bold]Examples[/]

  evermesh records                         [dim]# what every rank is doing, and since when[/]

  evermesh records quickstart --rank 2 --last 30

  evermesh records --json

Reads the shared memory of this machine, so ranks that are stopped, hang or were killed show too; of attempts that are
over it reads the copies in RUN/records, which nodes of other machines write there as well. A script that has ended is
found by the folder of its logs."""


def records(
    job: Job = None,
    runs: Runs = Path("runs"),
    rank: Annotated[list[int] | None, typer.Option("--rank", help="Only this rank. Repeatable.")] = None,
    last: Annotated[int, typer.Option("--last", min=1, metavar="N", help="Records of every rank, newest last.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """Show the last collectives and messages of every rank of a job, living or dead: what runs, since when, in which step."""
    from evermesh.launcher.records_table import find_recorded, show_records

    show_records(find_recorded(job, runs), ranks=rank, last=last, as_json=as_json)
