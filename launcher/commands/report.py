"""``evermesh report``: a run as a whole, as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from evermesh.launcher.commands.watching import Job, Runs

EXAMPLES = """[bold]Examples[/]

  evermesh report quickstart                        [dim]# writes runs/quickstart/report.html[/]

  evermesh report quickstart --price 2.5 --peak 989  [dim]# cost, and FLOP utilisation of an H100[/]

  evermesh report quickstart --json > report.json

The file needs nothing else: no script, nothing from the network. Works while the job runs, too."""


def report(
    job: Job = None,
    runs: Runs = Path("runs"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write it; default: RUN/report.html.")
    ] = None,
    price: Annotated[float | None, typer.Option("--price", min=0, help="Of one worker for an hour.")] = None,
    peak: Annotated[
        float | None, typer.Option("--peak", min=0.001, metavar="TFLOPS", help="Peak of one worker's device, TFLOP/s.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on the screen instead of a file.")] = False,
) -> None:
    """Write what became of a run into one file: cost, where the time went, every incident with its timeline."""
    from evermesh.launcher.finding import find_run
    from evermesh.launcher.report.gathering import gather

    run = find_run(job, runs)
    found, material = gather(run, price=price, peak_flops=peak and peak * 1e12)
    if as_json:
        print(found.model_dump_json(indent=1))
        return
    from evermesh.launcher.report.page import page

    path = output or run.directory / "report.html"
    path.write_text(page(found, material))
    print(f"{path}: {found.state}, goodput {found.goodput:.1%}, {len(found.incidents)} incidents")
