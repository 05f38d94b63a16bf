"""``evermesh checkpoint plan-load``."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from evermesh.launcher.commands.checkpoint.places import AsJson, OnePlace, newest_checkpoint
from evermesh.launcher.commands.jobs import Runs
from evermesh.launcher.errors import CheckpointRequestInvalid

if TYPE_CHECKING:
    from evermesh.checkpoint.load_planning import RankReads
    from evermesh.checkpoint.shard_map import ShardMap
    from evermesh.checkpoint.sources import Source

PLAN_LOAD_EXAMPLES = """[bold]Examples[/]

  evermesh checkpoint plan-load out/zero3 --ranks 64

  evermesh checkpoint plan-load quickstart --job deploy/jobs/quickstart.yaml"""
_MOST_ROWS = 16


def plan_load(
    place: OnePlace,
    ranks: Annotated[
        int | None,
        typer.Option("--ranks", min=1, help="Ranks that divide every tensor evenly, as in data parallelism."),
    ] = None,
    job: Annotated[
        Path | None, typer.Option("--job", metavar="JOB.yaml", help="A job: its model on its layout.")
    ] = None,
    runs: Runs = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """Tell what each rank would read of a checkpoint, without reading it: bytes, files, and stretches of files."""
    from evermesh import checkpoint
    from evermesh.checkpoint.load_planning import even_map, plan_load

    if (ranks is None) == (job is None):
        raise CheckpointRequestInvalid("say who is to load it: --ranks N, or --job JOB.yaml.")
    source = checkpoint.open_checkpoint(newest_checkpoint(place, runs))
    if job is not None:
        wanted, count = _of_job(job, source)
    else:
        assert ranks is not None
        wanted, count = even_map(source, ranks), ranks
    found = list(plan_load(source, wanted, range(count)))
    if as_json:
        print(json.dumps({"path": str(source.path), "ranks": [dataclasses.asdict(one) for one in found]}))
        return
    _print(found, source)


def _of_job(file: Path, source: "Source") -> "tuple[ShardMap, int]":
    """Who holds what of the job, and its ranks."""
    from evermesh.launcher.job_file import load_job
    from evermesh.runtime.planned_shards import planned_shard_map

    train = load_job(file).train
    embedding = source.tensors.get("parameter.embedding.weight")
    if embedding is None:
        raise CheckpointRequestInvalid(
            f"{source.path} has no parameter.embedding.weight, so its tensors are not those of {file}. Use --ranks N."
        )
    return planned_shard_map(train, embedding.shape[0]), train.layout.world_size


def _print(found: "Sequence[RankReads]", source: "Source") -> None:
    from evermesh.launcher.commands.checkpoint.progress import megabytes
    from evermesh.launcher.terminal import print_table

    table = Table("rank", "needs", "reads", "files", "stretches", box=None, header_style="bold", pad_edge=False)
    for one in found[:_MOST_ROWS]:
        numbers = (megabytes(one.bytes_needed), megabytes(one.bytes_read), str(len(one.files)), f"{one.runs:,}")
        table.add_row(str(one.rank), *numbers)
    print_table(table)
    if len(found) > _MOST_ROWS:
        print(f"and {len(found) - _MOST_ROWS:,} more ranks; all of them with --json")
    needed, reads = (sum(getattr(one, key) for one in found) for key in ("bytes_needed", "bytes_read"))
    most = max(found, key=lambda one: one.bytes_read)
    print(
        f"{source.path}: {len(found):,} ranks need {megabytes(needed)} and read {megabytes(reads)}; the most is "
        f"{megabytes(most.bytes_read)} on rank {most.rank}"
    )
