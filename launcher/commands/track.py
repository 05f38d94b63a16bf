"""``evermesh track``: an experiment tracker is told of a run, while it trains or later."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from evermesh.launcher.commands.watching import Job, Runs

EXAMPLES = """[bold]Examples[/]

  evermesh track quickstart                              [dim]# event files in runs/quickstart/tensorboard[/]

  evermesh track quickstart --to wandb --place my-project

  evermesh track quickstart --to mlflow --place http://mlflow:5000

A job does it by itself with [bold]trackers: [tensorboard][/] in its file. What a tracker
has been told once is not told again; what it missed is."""


def track(
    job: Job = None,
    runs: Runs = Path("runs"),
    to: Annotated[
        Literal["tensorboard", "wandb", "mlflow"], typer.Option("--to", help="Which tracker.")
    ] = "tensorboard",
    place: Annotated[
        str | None,
        typer.Option(
            "--place",
            metavar="PLACE",
            help="TensorBoard: folder. W&B: project. MLflow: address of the tracking server.",
        ),
    ] = None,
) -> None:
    """Tell an experiment tracker of a run until it has ended; Ctrl-C ends only the telling."""
    from evermesh.launcher.finding import find_run
    from evermesh.launcher.tracking.config import (
        AnyTracker,
        MlflowConfig,
        TensorBoardConfig,
        WandbConfig,
        check_tracker,
    )
    from evermesh.launcher.tracking.process import track_run

    run = find_run(job, runs)
    config: AnyTracker
    if to == "tensorboard":
        config = TensorBoardConfig(folder=Path(place) if place else None)
    elif to == "wandb":
        config = WandbConfig(project=place) if place else WandbConfig()
    else:
        config = MlflowConfig(uri=place)
    check_tracker(config)
    raise typer.Exit(track_run(run, config))
