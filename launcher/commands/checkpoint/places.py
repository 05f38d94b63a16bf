"""Which checkpoint a command is about."""

from pathlib import Path
from typing import Annotated

import typer

Place = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN or PATH]",
        help="A run, its directory, or a checkpoint; default: the latest run.",
        show_default=False,
    ),
]
OnePlace = Annotated[
    str, typer.Argument(metavar="RUN|PATH", help="A run (its newest checkpoint), or a checkpoint of any format.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


def directory_of(place: str | None, runs: Path) -> Path:
    """The folder of checkpoints that ``place`` means: of a run, or itself."""
    from evermesh.launcher.run_directory import Run

    if place is not None and Path(place).name == "manifest.json":
        return Path(place).parent
    if place is not None and Path(place).is_dir() and not (Path(place) / "state.json").is_file():
        return Path(place)
    return Run.find(place, runs).checkpoints


def newest_checkpoint(place: str | None, runs: Path) -> Path:
    """The checkpoint that ``place`` means: itself, or the newest of a run or a folder, complete if there is one."""
    from evermesh import checkpoint
    from evermesh.launcher.admission import incomplete

    directory = directory_of(place, runs)
    damaged = incomplete(directory)
    return checkpoint.latest(directory) or (damaged[-1] if damaged else directory)
