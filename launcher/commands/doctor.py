"""``evermesh doctor``."""

import json
from typing import Annotated

import typer

EXAMPLES = """[bold]Examples[/]

  evermesh doctor

  evermesh doctor --json

Exit codes: 0 nothing is bad, though it may be worse than it could be; 1 something is bad."""


def doctor(
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build anew what was built here before.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Look at what this machine can do for jobs: state, fact, way out. Builds and tests what is missing."""
    from rich.markup import escape
    from rich.table import Table

    from evermesh.launcher.doctor.check import exit_code
    from evermesh.launcher.doctor.recorder import check_recorder
    from evermesh.launcher.terminal import print_table

    checks = list(check_recorder(rebuild=rebuild))
    if as_json:
        print(json.dumps([check.to_dict() for check in checks], indent=1))
    else:
        table = Table()
        for column in ("section", "check", "state", "fact", "way out"):
            table.add_column(column)
        colour = {"good": "green", "worse": "yellow", "bad": "red"}
        for check in checks:
            state = f"[{colour[check.state]}]{check.state}[/]"
            table.add_row(check.section, check.name, state, escape(check.fact), escape(check.way_out))
        print_table(table)
    raise typer.Exit(exit_code(checks))
