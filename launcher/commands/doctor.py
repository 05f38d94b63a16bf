"""``evermesh doctor``."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from evermesh.launcher.doctor.sections import Found

EXAMPLES = """[bold]Examples[/]

  evermesh doctor

  evermesh doctor --quick --json

  evermesh doctor --cluster ray://10.0.0.1:6379

Exit codes: 0 all is well, or cannot be seen here; 1 something deserves a look; 2 something is bad."""
_HERE = ""


def doctor(
    quick: Annotated[bool, typer.Option("--quick", help="Host and GPUs only: no tests, nothing is built.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build anew what was built here before.")] = False,
    cluster: Annotated[
        str | None,
        typer.Option(help="All nodes of a Ray cluster, and the network between them: ray, or ray://HOST:PORT."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Look at this machine, and test what jobs will use: state, reason, way out. Builds what is missing."""
    from evermesh.fault.health.verdicts import exit_code
    from evermesh.launcher.doctor.sections import check_machine

    found = (
        {_HERE: list(check_machine(quick=quick, rebuild=rebuild))} if cluster is None else _of_cluster(cluster, quick)
    )
    if as_json:
        _print_json(found)
    else:
        _print_table(found)
    raise typer.Exit(exit_code(verdict for rows in found.values() for _, verdict in rows))


def _of_cluster(on: str, quick: bool) -> "dict[str, list[Found]]":
    """By node what was found there; what lies between nodes last."""
    from evermesh.fault.health.probes.pairs import judge_pairs
    from evermesh.launcher.admission import check_ray
    from evermesh.launcher.doctor.sections import Found

    check_ray(f"--cluster {on}")
    from evermesh.launcher.placement.ray_doctor import ClusterDoctor

    with ClusterDoctor(on) as doctors:
        found = doctors.look(quick=quick)
        between = judge_pairs(doctors.names, doctors.connect_pairs())
    return found | {"the cluster": [Found("network", verdict) for verdict in between]}


def _print_json(found: "Mapping[str, Sequence[Found]]") -> None:
    rows = [
        ({"node": node} if node else {}) | {"section": section, **verdict.to_dict()}
        for node, verdicts in found.items()
        for section, verdict in verdicts
    ]
    print(json.dumps(rows, indent=1))


def _print_table(found: "Mapping[str, Sequence[Found]]") -> None:
    """Of several nodes only what is not ok, and how much was."""
    from rich.markup import escape
    from rich.table import Table

    from evermesh.launcher.terminal import print_table

    table, colour = Table(), {"ok": "green", "warn": "yellow", "bad": "red"}
    for column in (*(["node"] if _HERE not in found else []), "section", "check", "state", "reason", "way out"):
        table.add_column(column)
    for node, rows in found.items():
        told = [row for row in rows if not node or row.verdict.state != "ok"]
        for section, verdict in told:
            state = f"[{colour[verdict.state]}]{verdict.state}[/]"
            words = (section, verdict.check, state, escape(verdict.reason), escape(verdict.way_out))
            table.add_row(*([escape(node)] if node else []), *words)
        if node and (fine := len(rows) - len(told)):
            table.add_row(escape(node), "", "", "[green]ok[/]", f"{fine} checks", "")
    print_table(table)
