"""The command line, ``evermesh``: what it can do, and how it ends.

Exit codes: 0 done (or stopped at ``stop_at``), 1 failed, 2 a wrong request, 75 run it again later, 93 do not, 128 +
signal after Ctrl-C or SIGTERM.
"""

import sys
from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from evermesh.launcher.commands import checkpoint, data, demo, jobs, plan, watching
from evermesh.launcher.errors import StoppedAtOnce
from evermesh.parallelism.errors import EvermeshError

app = typer.Typer(
    name="evermesh",
    help="Launch, resume and monitor distributed training of large language models, with a parallel plan per batch.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="[bold]Start here[/]\n\n  evermesh demo\n\n  evermesh launch deploy/jobs/quickstart.yaml\n\n"
    "  evermesh resume --workers 3\n\n  evermesh runs",
)
app.command("launch", epilog=jobs.LAUNCH_EXAMPLES)(jobs.launch)
app.command("resume", epilog=jobs.RESUME_EXAMPLES)(jobs.resume)
app.command("runs", epilog=jobs.RUNS_EXAMPLES)(jobs.list_runs)
app.command("status", epilog=watching.STATUS_EXAMPLES)(watching.status)
app.command("top")(watching.top)
app.command("logs", epilog=watching.LOGS_EXAMPLES)(watching.logs)
app.command("nodes")(watching.nodes)
app.command("dashboard")(watching.dashboard)
app.command("stop", epilog=watching.STOP_EXAMPLES)(watching.stop)
app.command("plan", epilog=plan.EXAMPLES)(plan.plan)
app.add_typer(checkpoint.app)
app.add_typer(data.app)
app.command("demo", epilog=demo.EXAMPLES)(demo.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        from evermesh import __version__

        print(f"evermesh {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line and end the process."""
    try:
        if sys.argv[1:2] == ["launch"]:
            _launch(sys.argv[2:])
        app()
    except EvermeshError as error:
        _show(error)
        sys.exit(getattr(error, "exit_code", 2))
    except OSError as error:  # a full disk, permissions: the machine's fault, as far as anyone can tell here
        _show(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _launch(arguments: list[str]) -> None:
    """Launch a script, whose flags are torchrun's; return where ``arguments`` are about a job file."""
    from evermesh.launcher.scripts import is_script, launch_script, script_help, wants_help

    if is_script(arguments):
        sys.exit(launch_script(arguments))
    if wants_help(arguments):
        with suppress(SystemExit):
            app()
        print(script_help())
        sys.exit(0)


def _show(error: EvermeshError | OSError) -> None:
    """Print an expected error without our traceback. That of a worker comes last: it is where a bug shows."""
    console = Console(stderr=True)
    word = "[yellow]stopped:[/]" if isinstance(error, StoppedAtOnce) else "[bold red]error:[/]"
    for text in (f"{word} {escape(str(error))}", *map(escape, getattr(error, "__notes__", ()))):
        console.print(text, highlight=False, soft_wrap=True)
    if traceback := getattr(error, "traceback", None):
        console.print(traceback.rstrip(), markup=False, highlight=False, soft_wrap=True)
