"""``evermesh checkpoint ls``, ``show``, ``verify`` and ``prune``."""

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from evermesh.checkpoint.stores.places import ObjectPath, Place, place_of
from evermesh.launcher.commands.jobs import Runs

PlaceArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[RUN or PATH]",
        help="A run, its directory, a checkpoint, or the URL of one in an object store; default: the latest run.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]

app = typer.Typer(
    name="checkpoint",
    help="List, show, verify and prune checkpoints, without loading them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="[bold]Examples[/]\n\n  evermesh checkpoint ls\n\n  evermesh checkpoint verify runs/quickstart",
)


@app.command("list", hidden=True)
@app.command(epilog="[bold]Example[/]\n\n  evermesh checkpoint ls quickstart")
def ls(place: PlaceArgument = None, runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """List the complete checkpoints of a run."""
    from evermesh import checkpoint
    from evermesh.launcher.terminal import print_table

    directory = _directory(place, runs)
    found = checkpoint.checkpoints(directory)
    if as_json:
        rows = [{"path": str(i.path), "step": i.step, "bytes": i.num_bytes, "latest": i.is_latest} for i in found]
        print(json.dumps(rows, indent=1))
        return
    if not found:
        print(f"no complete checkpoint in {directory}")
        _print_incomplete(directory)
        return
    print(directory)
    table = Table(
        "name", "step", "saved", "by ranks", "size", "tensors", "", box=None, header_style="bold", pad_edge=False
    )
    for info in found:
        saved = f"{datetime.fromtimestamp(info.time_s):%Y-%m-%d %H:%M:%S}"
        numbers = (
            str(info.step),
            saved,
            str(info.world_size),
            f"{info.num_bytes / 1e6:,.1f} MB",
            str(info.num_tensors),
        )
        table.add_row(info.path.name, *numbers, "latest" if info.is_latest else "")
    print_table(table)
    _print_incomplete(directory)


@app.command(epilog="[bold]Example[/]\n\n  evermesh checkpoint show runs/quickstart/checkpoints/step-00000030")
def show(place: PlaceArgument = None, runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """Show what is in a checkpoint, ours or one of DeepSpeed, torch.distributed or safetensors; of a run the newest one."""
    from evermesh import checkpoint
    from evermesh.launcher.terminal import print_table

    path = newest_checkpoint(place, runs)
    found = checkpoint.describe(path)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console = Console()
    console.print(f"[bold]{path}[/]", highlight=False, soft_wrap=True)
    for key in ("format", "step", "world_size", "num_bytes", "description", "objects", "left_out", "files"):
        console.print(f"  {key}: {found[key]}", highlight=False, markup=False, soft_wrap=True)
    table = Table("tensor", "dtype", "shape", "bytes", "extents", box=None, header_style="bold", pad_edge=False)
    tensors = found["tensors"]
    assert isinstance(tensors, list), "describe() gives a list of tensors"
    for tensor in tensors:
        assert isinstance(tensor, dict), "describe() gives a mapping per tensor"
        table.add_row(*(str(tensor[key]) for key in ("name", "dtype", "shape", "num_bytes", "num_extents")))
    print_table(table)


@app.command(epilog="[bold]Example[/]\n\n  evermesh checkpoint verify quickstart")
def verify(place: PlaceArgument = None, runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """Read a checkpoint (of a run the newest one) and check every byte; exit code 1 if something is wrong."""
    from evermesh import checkpoint

    report = checkpoint.verify(newest_checkpoint(place, runs))
    if as_json:
        problems = [{"kind": p.kind, "file": p.file, "text": p.text} for p in report.problems]
        print(json.dumps({"path": str(report.path), "ok": report.ok, "bytes": report.bytes_read, "problems": problems}))
    else:
        for problem in report.problems:
            print(f"{problem.kind}: {problem.file}: {problem.text}")
        count = len(report.problems)
        verdict = "whole" if report.ok else f"damaged, {count} problem{'' if count == 1 else 's'}"
        print(f"{report.path}: {verdict}; {report.num_files} files, {report.bytes_read:,} bytes read")
    raise typer.Exit(0 if report.ok else 1)


@app.command(epilog="[bold]Example[/]\n\n  evermesh checkpoint prune quickstart --keep-last 3 --keep-every 1000 --yes")
def prune(
    place: PlaceArgument = None,
    runs: Runs = Path("runs"),
    keep_last: Annotated[int, typer.Option(min=1, help="The newest so many stay.")] = 2,
    keep_every: Annotated[int | None, typer.Option(min=1, help="So do those of every so many steps.")] = None,
    keep_younger_h: Annotated[float | None, typer.Option(min=0, help="So do those of the last hours.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Remove them; without it only tell what would be removed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove old checkpoints of a run; the one to resume from always stays."""
    from evermesh import checkpoint

    age_s = None if keep_younger_h is None else keep_younger_h * 3600
    retention = checkpoint.Retention(keep_last, keep_every, age_s)
    found = checkpoint.prune(_directory(place, runs), retention, dry_run=not yes)
    if as_json:
        steps = {"kept": found.kept, "removed": found.removed, "bytes_freed": found.bytes_freed}
        print(json.dumps({"path": str(found.directory), "dry_run": not yes} | steps))
        return
    count = len(found.removed)
    what = f"{count} checkpoint{'' if count == 1 else 's'}, {found.bytes_freed / 1e6:,.1f} MB"
    print(f"{found.directory}: {'removed' if yes else 'would remove'} {what}; {len(found.kept)} stay")
    for step in found.removed:
        print(f"  step {step}")
    if count and not yes:
        print("nothing was removed; add --yes to do it")


def _print_incomplete(directory: Place) -> None:
    from evermesh.launcher.admission import incomplete

    for path in incomplete(directory):
        print(f"not complete: {path.name}; what it lacks tells: evermesh checkpoint verify {path}")


def _directory(place: str | None, runs: Path) -> Place:
    """The folder of checkpoints that ``place`` means: of a run, or itself."""
    from evermesh.launcher.run_directory import Run

    if place is not None and isinstance(url := place_of(place), ObjectPath):
        return url.parent if url.name == "manifest.json" else url
    if place is not None and Path(place).name == "manifest.json":
        return Path(place).parent
    if place is not None and Path(place).is_dir() and not (Path(place) / "state.json").is_file():
        return Path(place)
    return Run.find(place, runs).checkpoints


def newest_checkpoint(place: str | None, runs: Path) -> Place:
    """The checkpoint that ``place`` means: itself, or the newest of a run or a folder, complete if there is one."""
    from evermesh import checkpoint
    from evermesh.launcher.admission import incomplete

    directory = _directory(place, runs)
    damaged = incomplete(directory)
    return checkpoint.latest(directory) or (damaged[-1] if damaged else directory)
