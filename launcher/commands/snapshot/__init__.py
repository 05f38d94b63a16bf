"""``evermesh snapshot``: what snapshots in the memory of nodes survive, and what they cost."""

import typer

from evermesh.launcher.commands.snapshot import plan

app = typer.Typer(
    name="snapshot",
    help="Plan snapshots in the memory of nodes: which losses they survive, and how often to take them.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="[bold]Example[/]\n\n  evermesh snapshot plan --nodes 128 --per-rack 8 --code 6+2",
)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)

__all__ = ["app"]
