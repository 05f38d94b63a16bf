"""``evermesh status``, ``top``, ``logs``, ``dashboard``, ``relayout`` and ``stop``: jobs started anywhere."""

import json
import signal
from pathlib import Path
from typing import Annotated

import typer

Job = Annotated[
    str | None,
    typer.Argument(metavar="RUN", help="Name or directory of a run; default: the one that lives, or the latest."),
]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds the runs.")]

STATUS_EXAMPLES = """[bold]Examples[/]

  evermesh status                  [dim]# the job that runs here, or all of them[/]

  evermesh status quickstart --json

Finds your jobs whatever started them: a terminal that is gone, a notebook."""

TOP_EXAMPLES = """[bold]Examples[/]

  evermesh top

  evermesh top quickstart --once > now.txt"""

DASHBOARD_EXAMPLES = """[bold]Examples[/]

  evermesh dashboard quickstart --open

From another machine: ssh -L 4321:localhost:4321 HOST, then open
http://localhost:4321 and paste what RUN/token holds."""

LOGS_EXAMPLES = """[bold]Examples[/]

  evermesh logs -f                 [dim]# of all ranks, as they come[/]

  evermesh logs quickstart --rank 2

  evermesh logs --stacks           [dim]# what every rank is, or was, doing[/]"""

RELAYOUT_EXAMPLES = """[bold]Examples[/]

  evermesh relayout quickstart tp=2            [dim]# tensor parallel ranks, and half as many HDP ranks[/]

  evermesh relayout quickstart pp=1 hdp=4 'sharding={parameters: all, gradients: all}'"""

STOP_EXAMPLES = """[bold]Examples[/]

  evermesh stop                    [dim]# finishes the step, saves a checkpoint, ends[/]

  evermesh stop quickstart --grace 60

  evermesh stop --now              [dim]# without a checkpoint[/]"""


def status(
    job: Job = None,
    runs: Runs = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables.")] = False,
) -> None:
    """Show a job: its state and why, its nodes and ranks; without RUN all jobs of yours on this machine."""
    from evermesh.launcher.finding import find_job, living_jobs
    from evermesh.launcher.status_tables import jobs_table, show_status
    from evermesh.launcher.terminal import print_table

    living = living_jobs()
    if job is None and len(living) > 1:
        if as_json:
            print(json.dumps([entry.as_row() for entry in living], indent=1))
        else:
            print_table(jobs_table(living))
        return
    show_status(find_job(job, runs, living), as_json=as_json)


def top(
    job: Job = None,
    runs: Runs = Path("runs"),
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
) -> None:
    """Watch a job live: step time and compute time of every rank, loss, throughput, events. Ctrl-C ends the watching."""
    from evermesh.launcher.finding import find_run
    from evermesh.launcher.top import watch

    watch(find_run(job, runs), once=once)


def logs(
    job: Job = None,
    runs: Runs = Path("runs"),
    rank: Annotated[list[int] | None, typer.Option("--rank", help="Only this rank. Repeatable.")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what is printed from now on.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Last lines of every log.")] = 20,
    stacks: Annotated[
        bool, typer.Option("--stacks", help="What the ranks are doing instead of what they print.")
    ] = False,
    control: Annotated[bool, typer.Option("--control", help="Logs of the controller and the agents.")] = False,
) -> None:
    """Print what the ranks of a job printed."""
    from evermesh.launcher.finding import find_job
    from evermesh.launcher.log_files import ask_for_stacks, log_files, print_logs

    found = find_job(job, runs)
    if stacks:
        ask_for_stacks(found)
    print_logs(log_files(found, ranks=rank, stacks=stacks, control=control), lines, follow=follow)


def dashboard(
    job: Job = None,
    runs: Runs = Path("runs"),
    opens: Annotated[bool, typer.Option("--open", help="Open it in a browser, too.")] = False,
) -> None:
    """Make a page that opens the dashboard of a job; only you can read it, for it holds the token."""
    import webbrowser

    from evermesh.launcher.client import Client
    from evermesh.launcher.finding import find_run

    run = find_run(job, runs)
    client = Client(run, patience_s=1.0)
    client.status()
    page = client.write_entry_page()
    print(f"open file://{page} in a browser on this machine")
    if opens and not webbrowser.open(f"file://{page}"):
        raise typer.BadParameter("no browser is found here: set BROWSER, or open the page above yourself")


def relayout(
    run: Annotated[str, typer.Argument(help="Name or directory of a run that lives.")],
    changes: Annotated[list[str], typer.Argument(metavar="KEY=VALUE...", help="Fields of train.layout, such as tp=2.")],
    runs: Runs = Path("runs"),
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when it has moved.")] = True,
) -> None:
    """Have a running job go on with another layout: behind its step its state moves through memory, nothing restarts.

    Without hdp among the changes, HDP ranks are what the other degrees leave. After a failure the job goes on with the layout
    in which its newest checkpoint was written, after a resume with that of its job file.
    """
    from evermesh.launcher.finding import find_run
    from evermesh.launcher.relayout import change_layout, read_changes

    print(change_layout(find_run(run, runs), read_changes(changes), wait=wait))


def stop(
    job: Job = None,
    runs: Runs = Path("runs"),
    now: Annotated[bool, typer.Option("--now", help="At once, without a checkpoint.")] = False,
    grace_s: Annotated[
        float | None, typer.Option("--grace", min=0, metavar="SECONDS", help="Time to save; then at once.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when it has ended.")] = True,
) -> None:
    """End a job after its step and a checkpoint."""
    from evermesh.launcher.finding import find_job
    from evermesh.launcher.stopping import stop_job

    number = signal.SIGKILL if now else signal.SIGTERM
    print(stop_job(find_job(job, runs), at_once=number is signal.SIGKILL, grace_s=grace_s, wait=wait))
