"""``evermesh checkpoint``: what can be done with checkpoints of any format, without a GPU and without a process group."""

import typer

from evermesh.launcher.commands import export
from evermesh.launcher.commands.checkpoint import (
    comparing,
    converting,
    extracting,
    listing,
    load_plan,
    pruning,
    verifying,
)

app = typer.Typer(
    name="checkpoint",
    help="List, show, verify, repair, compare, convert and prune checkpoints, of ours and of other libraries.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="[bold]Examples[/]\n\n  evermesh checkpoint ls\n\n  evermesh checkpoint verify runs/quickstart",
)
app.command("list", hidden=True)(listing.ls)
app.command("ls", epilog=listing.LS_EXAMPLES)(listing.ls)
app.command("show", epilog=listing.SHOW_EXAMPLES)(listing.show)
app.command("verify", epilog=verifying.VERIFY_EXAMPLES)(verifying.verify)
app.command("repair", epilog=verifying.REPAIR_EXAMPLES)(verifying.repair)
app.command("diff", epilog=comparing.DIFF_EXAMPLES)(comparing.diff)
app.command("extract", epilog=extracting.EXTRACT_EXAMPLES)(extracting.extract)
app.command("plan-load", epilog=load_plan.PLAN_LOAD_EXAMPLES)(load_plan.plan_load)
app.command("convert", epilog=converting.CONVERT_EXAMPLES)(converting.convert)
app.command("export", epilog=export.EXAMPLES)(export.export)
app.command("prune", epilog=pruning.PRUNE_EXAMPLES)(pruning.prune)

__all__ = ["app"]
