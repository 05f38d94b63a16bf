"""``evermesh checkpoint extract``."""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from evermesh.launcher.commands.checkpoint.places import AsJson, OnePlace, local_path, newest_checkpoint
from evermesh.launcher.commands.jobs import Runs

EXTRACT_EXAMPLES = """[bold]Examples[/]

  evermesh checkpoint extract quickstart --tensor 'parameter.*' weights.safetensors

  evermesh checkpoint extract out/zero3 --tensor 'exp_avg.up.weight[0:4, :]' rows.npy"""


def extract(
    place: OnePlace,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A new .safetensors or .npy file.")],
    tensor: Annotated[
        list[str], typer.Option("--tensor", "-t", help="A name, a pattern, or a name with a box: 'w[0:4, :]'.")
    ],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None,
        typer.Option("--dtype", help="Convert floating values; default: as they are."),
    ] = None,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Take tensors out of a checkpoint of any format into a file; only their bytes are read."""
    from evermesh import checkpoint
    from evermesh.checkpoint import extracting
    from evermesh.launcher.commands.checkpoint.progress import megabytes

    source = checkpoint.open_checkpoint(newest_checkpoint(place, runs))
    written = extracting.extract(source, tensor, local_path(file), dtype=dtype)
    if as_json:
        tensors = {name: {"dtype": content.dtype, "shape": content.shape} for name, content in written.items()}
        print(json.dumps({"path": str(file), "from": str(source.path), "tensors": tensors}))
        return
    for name, content in written.items():
        print(f"{name} {content.dtype} {list(content.shape)}")
    num_bytes = sum(content.num_bytes for content in written.values())
    print(f"{file}: {len(written)} tensors, {megabytes(num_bytes)}, from {source.path}")
