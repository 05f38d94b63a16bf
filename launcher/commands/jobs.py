"""``evermesh launch``, ``resume`` and ``runs``."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from evermesh.launcher.run_directory import Run

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the job, such as train.steps=20. Repeatable."),
]
Nodes = Annotated[int | None, typer.Option("--nodes", min=1, help="Nodes that share the workers equally.")]
Spares = Annotated[int | None, typer.Option("--spares", min=0, help="Nodes beyond those, to replace a lost one.")]
On = Annotated[
    str | None,
    typer.Option(
        "--on",
        metavar="PLACE",
        help="Where the nodes are: local, slurm (this allocation), ray (RAY_ADDRESS or here), ray://HOST:PORT, or auto.",
    ),
]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Return at once; `evermesh status` finds the job.")]
Runs = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Folder that holds the runs.")]

LAUNCH_EXAMPLES = """[bold]Examples[/]

  evermesh launch deploy/jobs/quickstart.yaml

  evermesh launch job.yaml --name wide --set train.model.hidden=256

  evermesh launch job.yaml --on ray --nodes 2 --spares 1

  evermesh launch --workers 2 train.py --lr 3e-4    [dim]# any script; see below[/]

Ctrl-C finishes the step, saves a checkpoint and ends; twice ends at once.

A lost terminal ends nothing: `evermesh status` finds the job again."""

RESUME_EXAMPLES = """[bold]Examples[/]

  evermesh resume                           [dim]# the run that was started last[/]

  evermesh resume quickstart --workers 3    [dim]# on another number of workers[/]

  evermesh resume runs/quickstart --set train.steps=200"""

RUNS_EXAMPLES = """[bold]Examples[/]

  evermesh runs

  evermesh runs --runs /data/runs --json"""


def launch(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)],
    overrides: Set = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; default: the job's.")] = None,
    nodes: Nodes = None,
    spares: Spares = None,
    on: On = None,
    goes_on: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the newest run of this name that has a checkpoint, if there is one."),
    ] = False,
    detach: Detach = False,
) -> None:
    """Train a job, on this machine or on several, until it ends or reaches its [bold]stop_at[/]."""
    from evermesh.launcher.job_file import load_job
    from evermesh.launcher.placement.choosing import placed
    from evermesh.launcher.queueing import launch_queued
    from evermesh.launcher.terminal import lasting_console

    given = _overrides(name=name, nodes=nodes, spares=spares, on=on)
    config = placed(load_job(job, [*(overrides or ()), *given]))
    trained = launch_queued(config, lasting_console(), detach=detach, goes_on=goes_on)
    raise typer.Exit(trained.result.exit_code)


def resume(
    run: Annotated[str | None, typer.Argument(help="Name or directory of a run; default: the latest.")] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Train on this many workers from now.")
    ] = None,
    nodes: Nodes = None,
    spares: Spares = None,
    on: On = None,
    detach: Detach = False,
    overrides: Set = None,
    runs: Runs = Path("runs"),
) -> None:
    """Train a run on from its newest checkpoint, on the same or another number of workers."""
    from evermesh.launcher.queueing import resume_queued
    from evermesh.launcher.run_directory import Run
    from evermesh.launcher.terminal import lasting_console

    given = [*(overrides or ()), *_overrides(nodes=nodes, spares=spares, on=on)]
    trained = resume_queued(Run.find(run, runs), lasting_console(), workers=workers, overrides=given, detach=detach)
    raise typer.Exit(trained.result.exit_code)


def list_runs(
    runs: Runs = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list instead of a table.")] = False,
) -> None:
    """List the runs and what became of them."""
    from evermesh.launcher.run_directory import Run
    from evermesh.launcher.terminal import print_table

    rows = [_row(run) for run in Run.all(runs)]
    if as_json:
        print(json.dumps(rows, indent=1))
    elif not rows:
        print(f"no runs in {runs}. Start one with: evermesh launch JOB.yaml")
    else:
        print_table(_table(rows))
        _print_errors(rows)


def _overrides(**values: str | int | None) -> list[str]:
    """Options that stand for a key of the job, as overrides."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]


def _row(run: "Run") -> dict[str, Any]:
    from evermesh.launcher.summary import last_report
    from evermesh.parallelism.errors import EvermeshError

    try:
        state, status, steps = run.state(), run.status(), run.config().train.steps
    except EvermeshError as error:  # one damaged run must not hide the others
        return {"name": run.name, "state": "damaged", "directory": str(run.directory), "error": str(error)}
    report = last_report(run.telemetry)
    return {
        "name": run.name,
        "state": status,
        "step": report.step if report else 0,
        "steps": steps,
        "loss": report.loss if report else None,
        "workers": state.workers,
        "attempt": state.attempt,
        "directory": str(run.directory),
        "error": state.error,
    }


def _print_errors(rows: list[dict[str, Any]]) -> None:
    """Say what is wrong with damaged runs, and why the newest run failed."""
    for row in rows:
        if row["state"] == "damaged" or (row is rows[-1] and row["state"] == "failed"):
            text = f"{row['name']}: {row['error'].splitlines()[0]}"
            Console().print(text, style="dim", markup=False, highlight=False, soft_wrap=True)


def _table(rows: list[dict[str, Any]]) -> Table:
    colours = {
        "running": "cyan",
        "finished": "green",
        "stopped": "yellow",
        "failed": "red",
        "died": "red",
        "damaged": "red",
    }
    table = Table(
        "name", "state", "step", "loss", "workers", "directory", box=None, header_style="bold", pad_edge=False
    )
    for row in rows:
        loss = f"{row['loss']:.4f}" if row.get("loss") is not None else ""
        step = f"{row['step']}/{row['steps']}" if "step" in row else ""
        state = f"[{colours.get(row['state'], 'default')}]{row['state']}[/]"
        table.add_row(row["name"], state, step, loss, str(row.get("workers", "")), row["directory"])
    return table
