"""``evermesh traffic``: the paths of a job through the network."""

import typer

from evermesh.launcher.commands.traffic import plan

app = typer.Typer(
    name="traffic",
    help="Plan the paths of a job through a network of leaf and spine switches.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="[bold]Example[/]\n\n  evermesh traffic plan job.yaml --topology cluster.yaml",
)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)

__all__ = ["app"]
