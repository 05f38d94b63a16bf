"""``evermesh metrics``: numbers for Prometheus, of a job, or of this machine without one."""

from pathlib import Path
from typing import Annotated

import typer

from evermesh.launcher.commands.watching import Job, Runs

EXAMPLES = """[bold]Examples[/]

  evermesh metrics quickstart               [dim]# of a job, once[/]

  evermesh metrics --serve 127.0.0.1:9464   [dim]# of this machine, to whoever asks, until Ctrl-C[/]

A job needs no command: prometheus.json in its run says where its controller and its agents serve them."""


def metrics(
    job: Job = None,
    runs: Runs = Path("runs"),
    serve: Annotated[
        str | None,
        typer.Option("--serve", metavar="HOST:PORT", help="Serve numbers of this machine there; needs no job."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="FILE", help="Answer only requests that show the token in this file."),
    ] = None,
) -> None:
    """Print the numbers of a job in the text format of Prometheus, or serve those of this machine."""
    if serve is None:
        from evermesh.launcher.finding import find_run
        from evermesh.launcher.metrics.showing import numbers_of

        print(numbers_of(find_run(job, runs)), end="")
        return
    from evermesh.launcher.metrics.showing import serve_machine

    serve_machine(serve, token_file)
