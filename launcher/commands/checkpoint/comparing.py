"""``evermesh checkpoint diff``."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evermesh.launcher.commands.checkpoint.places import AsJson, OnePlace, newest_checkpoint
from evermesh.launcher.commands.jobs import Runs
from evermesh.launcher.errors import CheckpointRequestInvalid

if TYPE_CHECKING:
    from evermesh.checkpoint.comparing import DiffReport
    from evermesh.checkpoint.naming import Naming
    from evermesh.checkpoint.sources import Source

DIFF_EXAMPLES = """[bold]Examples[/]

  evermesh checkpoint diff quickstart out/zero3

  evermesh checkpoint diff a/step-00000010 b/step-00000010 --tolerance 1e-6 --no-objects"""


def diff(
    a: OnePlace,
    b: Annotated[str, typer.Argument(metavar="RUN|PATH", help="Another one.")],
    tolerance: Annotated[
        float | None,
        typer.Option("--tolerance", min=0, help="Relative; numbers may differ by so much. Default: every bit counts."),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option("--names", metavar="FILE.json", help="How tensors of the first are called in the second."),
    ] = None,
    objects: Annotated[bool, typer.Option(help="Compare what is no tensor, too.")] = True,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints of any formats and topologies; exit code 1 if they differ."""
    from evermesh import checkpoint
    from evermesh.checkpoint import comparing
    from evermesh.checkpoint.converting import bytes_to_write
    from evermesh.launcher.commands.checkpoint.progress import bytes_bar

    one, other = (checkpoint.open_checkpoint(newest_checkpoint(place, runs)) for place in (a, b))
    table = _naming(names, one) if names else None
    with bytes_bar("comparing", bytes_to_write(one)) as tell:
        found = comparing.diff(one, other, tolerance=tolerance, names=table, tell=tell)
    if not objects:
        found = dataclasses.replace(found, objects=())
    if as_json:
        print(json.dumps({"a": str(one.path), "b": str(other.path), "same": found.same} | dataclasses.asdict(found)))
    else:
        _print(found, one, other)
    raise typer.Exit(0 if found.same else 1)


def _print(found: "DiffReport", one: "Source", other: "Source") -> None:
    for name in found.missing:
        print(f"only in {one.path}: {name}")
    for name in found.extra:
        print(f"only in {other.path}: {name}")
    for line in found.other_kind:
        print(f"of another kind: {line}")
    for tensor in found.differing:
        x, y = tensor.values
        first = ", ".join(map(str, tensor.first))
        print(
            f"differs: {tensor.name}: {tensor.num_differing:,} of {tensor.num_elements:,} elements, by up to "
            f"{tensor.largest:.6g}; first at [{first}]: {x:.9g} and {y:.9g}"
        )
    for line in found.objects:
        print(f"object {line}")
    verdict = "the same" if found.same else "not the same"
    print(f"{verdict}: {one.path} and {other.path}; {found.num_compared:,} tensors compared")


def _naming(file: Path, source: "Source") -> "Naming":
    """A table of patterns, applied to the tensors of ``source`` that match one."""
    from evermesh.checkpoint.errors import ShardMapInvalid
    from evermesh.checkpoint.foreign.training import in_our_names
    from evermesh.checkpoint.naming import bind

    try:
        table = json.loads(file.read_text())
        shapes = {name: tensor.shape for name, tensor in in_our_names(source).tensors.items()}
        return bind(table, shapes, unread=("*",))
    except (ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ShardMapInvalid):
            raise
        raise CheckpointRequestInvalid(
            f'{file}: it is no table of names ({error}). Write {{"parameter.{{layer}}.w": "model.{{layer}}.w", ...}}.'
        ) from error
