"""``evermesh checkpoint prune``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from evermesh.launcher.commands.checkpoint.places import AsJson, PlaceArgument, directory_of
from evermesh.launcher.commands.jobs import Runs

PRUNE_EXAMPLES = "[bold]Example[/]\n\n  evermesh checkpoint prune quickstart --keep-last 3 --keep-every 1000 --yes"


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
    found = checkpoint.prune(directory_of(place, runs), retention, dry_run=not yes)
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
