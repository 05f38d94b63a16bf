"""``evermesh doctor``."""

import json
from typing import Annotated

import typer

EXAMPLES = """[bold]Examples[/]

  evermesh doctor

  evermesh doctor --quick --json

Exit codes: 0 all is well, or cannot be seen here; 1 something deserves a look; 2 something is bad."""


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Host and GPUs only: no tests, nothing is built.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build anew what was built here before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Look at this machine, and test what jobs will use: state, reason, way out. Builds what is missing."""
    from rich.markup import escape
    from rich.table import Table

    from evermesh.fault.health.verdicts import exit_code
    from evermesh.launcher.doctor.sections import check_machine
    from evermesh.launcher.terminal import print_table

    found = list(check_machine(quick=quick, rebuild=rebuild))
    if as_json:
        print(json.dumps([{"section": section, **verdict.to_dict()} for section, verdict in found], indent=1))
    else:
        table = Table()
        for column in ("section", "check", "state", "reason", "way out"):
            table.add_column(column)
        colour = {"ok": "green", "warn": "yellow", "bad": "red"}
        for section, verdict in found:
            state = f"[{colour[verdict.state]}]{verdict.state}[/]"
            table.add_row(section, verdict.check, state, escape(verdict.reason), escape(verdict.way_out))
        print_table(table)
    raise typer.Exit(exit_code(verdict for _, verdict in found))
