"""Which checkpoint a command is about."""

from pathlib import Path
from typing import Annotated

import typer

from evermesh.checkpoint.stores.places import ObjectPath, Place, place_of

PlaceArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN or PATH]",
        help="A run, its directory, a checkpoint, or the URL of one in an object store; default: the latest run.",
        show_default=False,
    ),
]
OnePlace = Annotated[
    str, typer.Argument(metavar="RUN|PATH", help="A run (its newest checkpoint), a checkpoint of any format, or a URL.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]


def directory_of(place: str | None, runs: Path) -> Place:
    """The folder of checkpoints that ``place`` means: of a run, or itself."""
    from evermesh.launcher.run_directory import Run

    if place is not None and isinstance(url := place_of(place), ObjectPath):
        return url.parent if url.name == "manifest.json" else url
    if place is not None and Path(place).name == "manifest.json":
        return Path(place).parent
    if place is not None and Path(place).is_dir() and not (Path(place) / "state.json").is_file():
        return Path(place)
    return Run.find(place, runs).checkpoints


def local_path(new: str) -> Path:
    """The path of something that is to be written. Raises ``CheckpointRequestInvalid`` if it is in an object store."""
    from evermesh.launcher.errors import CheckpointRequestInvalid

    path = place_of(new)
    if isinstance(path, ObjectPath):
        raise CheckpointRequestInvalid(
            f"{path} is in an object store; this is written to file systems only. Name a path, and copy it from there."
        )
    return path


def newest_checkpoint(place: str | None, runs: Path) -> Place:
    """The checkpoint that ``place`` means: itself, or the newest of a run or a folder, complete if there is one."""
    from evermesh import checkpoint
    from evermesh.launcher.admission import incomplete

    directory = directory_of(place, runs)
    damaged = incomplete(directory)
    return checkpoint.latest(directory) or (damaged[-1] if damaged else directory)
