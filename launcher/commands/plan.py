"""``evermesh plan``: one batch, planned and drawn, without training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from evermesh.launcher.config import JobConfig

EXAMPLES = """[bold]Examples[/]

  evermesh plan deploy/jobs/quickstart.yaml    [dim]# its first batch[/]

  evermesh plan deploy/jobs/quickstart.yaml --batch 7 --workers 6 --png plan.png

  evermesh plan lengths.txt.gz --workers 64 --capacity 32768"""


def plan(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="JOB.yaml|LENGTHS.txt", help="A job, or a file with one length per line.", show_default=False
        ),
    ],
    batch: Annotated[int, typer.Option("--batch", min=1, help="Which batch of the job.")] = 1,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Plan for this many ranks.")] = None,
    capacity: Annotated[
        int | None, typer.Option("--capacity", min=1, help="Tokens of one micro-batch on a rank.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Also write the picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole plan as JSON.")] = False,
) -> None:
    """Plan one batch and show which ranks run which micro-batch when."""
    from evermesh.launcher import planning
    from evermesh.launcher.plan_picture import certificate_line, headline, plan_png, plan_text

    if source.suffix in {".yaml", ".yml"}:
        planned = planning.plan_of_job(_job(source, workers, capacity), batch, Console(stderr=True))
    else:
        planned = planning.plan_of_lengths(source, workers or 8, capacity)
    if png:
        plan_png(planned.plan, planned.timeline, png, title=f"batch plan of {source.name}")
    if as_json:
        print(planned.plan.to_json().decode())
        return
    console = Console()
    console.print(headline(planned.plan), highlight=False, soft_wrap=True)
    console.print(plan_text(planned.plan, planned.timeline, width=console.width), soft_wrap=True)
    console.print(certificate_line(planned.plan), highlight=False, soft_wrap=True)
    if png:
        console.print(f"picture: {png}", highlight=False, soft_wrap=True)


def _job(path: Path, workers: int | None, capacity: int | None) -> "JobConfig":
    from evermesh.launcher.job_file import load_job

    overrides = [f"train.layout.capacity={capacity}"] if capacity else []
    config = load_job(path, overrides)
    if workers is None:
        return config
    hdp = config.train.layout.fitted_to(workers).hdp
    return load_job(path, [*overrides, f"workers={workers}", f"train.layout.hdp={hdp}"])
