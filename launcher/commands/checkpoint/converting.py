"""``evermesh checkpoint convert``."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from evermesh.checkpoint.formats import Format
from evermesh.launcher.commands.checkpoint.places import AsJson, OnePlace, newest_checkpoint
from evermesh.launcher.commands.jobs import Runs
from evermesh.launcher.errors import CheckpointRequestInvalid

CONVERT_EXAMPLES = """[bold]Examples[/]

  evermesh checkpoint convert out/zero3 new --to deepspeed-zero1 --ranks 16

  evermesh checkpoint convert quickstart new --to torch-distributed

  evermesh checkpoint convert out/zero3 new --to safetensors --dtype bfloat16"""
_MOST_TOLD = 10


def convert(
    place: OnePlace,
    directory: Annotated[
        str, typer.Argument(metavar="DIRECTORY", help="The new one; a URL of an object store, too, to evermesh.")
    ],
    to: Annotated[Format, typer.Option("--to", help="What to write.")],
    ranks: Annotated[int, typer.Option("--ranks", min=1, help="Ranks that are to load it, of DeepSpeed's.")] = 1,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option("--dtype", help="Type of the weights to compute with; default: as the checkpoint says."),
    ] = None,
    step: Annotated[int | None, typer.Option("--step", min=0, help="If the checkpoint does not say.")] = None,
    groups: Annotated[
        Path | None,
        typer.Option("--groups", metavar="FILE.json", help="Groups of the optimizer, if it does not say."),
    ] = None,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint anew in the format of another library, in bounded memory; it appears when it is complete."""
    from evermesh import checkpoint
    from evermesh.checkpoint import converting
    from evermesh.launcher.commands.checkpoint.progress import bytes_bar, megabytes

    source = checkpoint.open_checkpoint(newest_checkpoint(place, runs))
    conversion = converting.Conversion(to, ranks, dtype, step, _groups(groups) if groups else None)
    with bytes_bar("writing", converting.bytes_to_write(source)) as tell:
        done = converting.convert(source, directory, conversion, tell)
    if as_json:
        told = {"path": str(done.path), "from": source.kind, "to": to, "files": done.num_files, "bytes": done.num_bytes}
        print(json.dumps(told | {"left_out": done.left_out}))
        return
    print(f"{done.path}: {to}, {megabytes(done.num_bytes)} in {done.num_files} files, from {source.kind} {source.path}")
    for one in done.left_out[:_MOST_TOLD]:
        print(f"  left out: {one}")
    if len(done.left_out) > _MOST_TOLD:
        print(f"  and {len(done.left_out) - _MOST_TOLD} more")


def _groups(file: Path) -> list[dict[str, Any]]:
    try:
        groups = json.loads(file.read_text())
        if isinstance(groups, list) and all(isinstance(group["names"], list) for group in groups):
            return groups
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointRequestInvalid(f"{file}: {_WANTED} ({error!r})") from error
    raise CheckpointRequestInvalid(f"{file}: {_WANTED}")


_WANTED = (
    'it is no list of groups. Write [{"names": ["*.weight"], "settings": {"lr": 0.001, ...}, "numbers": {"step": 100.0}}, '
    "...], where names may be patterns."
)
