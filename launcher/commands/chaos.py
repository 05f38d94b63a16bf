"""``evermesh chaos``."""

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from evermesh.launcher.commands.jobs import Set

if TYPE_CHECKING:
    from evermesh.fault.injection import Injection
    from evermesh.launcher.chaos.report import ChaosReport
    from evermesh.launcher.config import JobConfig

EXAMPLES = """[bold]Examples[/]

  evermesh chaos job.yaml --schedule faults.yaml --compare

  evermesh chaos job.yaml --seed 7 --faults 20 --kinds kill=3,stop,raise

A schedule, faults.yaml:

  seed: 7

  faults:

  - {kind: kill, target: rank 1, at: {step: 5, phase: backward}}

  - {kind: stop, target: agent any, at: {seconds: 3}, continue_after_s: 2}

Exit code 0 if the job ended as expected, every fault was injected, nothing

is left of it, and, with --compare, its numbers are those of a clean run."""


def chaos(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="The job file.", show_default=False)],
    schedule: Annotated[
        Path | None, typer.Option("--schedule", metavar="FILE", help="What goes wrong, YAML or JSON; else it is drawn.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of faults that are drawn.")] = 0,
    faults: Annotated[int, typer.Option("--faults", min=1, help="How many are drawn.")] = 5,
    kinds: Annotated[
        str | None,
        typer.Option("--kinds", metavar="KIND[=RATE],...", help="Of which kinds: kill, stop, slow, raise, hang, ..."),
    ] = None,
    compared: Annotated[bool, typer.Option("--compare", help="Train once more without faults, and compare.")] = False,
    overrides: Set = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the run; default: the job's.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The report as JSON; progress goes to standard error.")
    ] = False,
) -> None:
    """Train a job while faults are injected into it, and report what became of each."""
    from evermesh.launcher.chaos.running import run_chaos
    from evermesh.launcher.job_file import load_job
    from evermesh.launcher.terminal import lasting_console

    given = [f"name={json.dumps(name)}"] if name is not None else []
    config = load_job(job, [*(overrides or ()), *given])
    config, injection = _chosen(config, schedule, seed, faults, kinds)
    if as_json:
        with redirect_stdout(sys.stderr):  # it is for the report alone
            report = run_chaos(config, injection, Console(stderr=True), compared=compared)
        print(report.model_dump_json(indent=1))
    else:
        report = run_chaos(config, injection, lasting_console(), compared=compared)
        _print(report)
    raise typer.Exit(0 if report.passed else 1)


def _chosen(
    config: "JobConfig", schedule: Path | None, seed: int, faults: int, kinds: str | None
) -> "tuple[JobConfig, Injection]":
    """The job, and what goes wrong in it: as a file says, or drawn. So many drawn faults need as many restarts."""
    from evermesh.fault.errors import ScheduleInvalid
    from evermesh.fault.injection import draw, resolve
    from evermesh.launcher.chaos.running import shape_of
    from evermesh.launcher.chaos.schedule_file import read_schedule, with_lines

    shape = shape_of(config)
    if schedule is None:
        injection = resolve(draw(seed, faults, shape, _rates(kinds)), shape)
        return config.model_copy(update={"restarts": max(config.restarts, len(injection.shots))}), injection
    given, lines = read_schedule(schedule)
    try:
        return config, resolve(given, shape)
    except ScheduleInvalid as error:
        raise with_lines(error, schedule, lines) from None


def _rates(kinds: str | None) -> dict[str, float] | None:
    """``kill=3,stop`` by kind; a kind without a rate has 1."""
    from evermesh.fault.errors import ScheduleInvalid

    if kinds is None:
        return None
    found = {}
    for part in kinds.split(","):
        kind, _, rate = part.strip().partition("=")
        try:
            found[kind] = float(rate or 1)
        except ValueError:
            raise ScheduleInvalid([("--kinds", f"{part!r} is not KIND or KIND=RATE, such as kill=3")]) from None
        if not 0 < found[kind] < float("inf"):
            raise ScheduleInvalid([("--kinds", f"the rate of {kind} is {rate}; it must be above 0")])
    return found


def _print(report: "ChaosReport") -> None:
    from evermesh.launcher.chaos.table import fault_table, lines
    from evermesh.launcher.terminal import print_table

    print()
    print_table(fault_table(report))
    console = Console()
    for line in lines(report):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    _print_verdict(console, report.problems)


def _print_verdict(console: Console, problems: Sequence[str]) -> None:
    for problem in problems:
        console.print(f"[red]NO[/]  {problem}", highlight=False, soft_wrap=True)
    if not problems:
        console.print("[green]passed[/]", highlight=False)
