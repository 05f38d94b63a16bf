"""``evermesh checkpoint ls`` and ``show``."""

import json
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evermesh.checkpoint.stores.places import Place
from evermesh.launcher.commands.checkpoint.places import AsJson, PlaceArgument, directory_of, newest_checkpoint
from evermesh.launcher.commands.jobs import Runs

LS_EXAMPLES = "[bold]Example[/]\n\n  evermesh checkpoint ls quickstart"
SHOW_EXAMPLES = "[bold]Example[/]\n\n  evermesh checkpoint show runs/quickstart/checkpoints/step-00000030"


def ls(place: PlaceArgument = None, runs: Runs = Path("runs"), as_json: AsJson = False) -> None:
    """List the complete checkpoints of a run."""
    from evermesh import checkpoint
    from evermesh.launcher.terminal import print_table

    directory = directory_of(place, runs)
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


def _print_incomplete(directory: Place) -> None:
    from evermesh.launcher.admission import incomplete

    for path in incomplete(directory):
        print(f"not complete: {path.name}; what it lacks tells: evermesh checkpoint verify {path}")
