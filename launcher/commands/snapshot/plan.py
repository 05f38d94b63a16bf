"""``evermesh snapshot plan``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from evermesh.launcher.snapshot_plan import SnapshotPlan

EXAMPLES = """[bold]Examples[/]

  evermesh snapshot plan --nodes 128 --per-rack 8 --code 6+2

  evermesh snapshot plan --topology cluster.json --must-survive rack --json

  evermesh snapshot plan --nodes 64 --copies 32 --copied 0.75 [dim]# pp 2, experts of one node each[/]

  evermesh snapshot plan --nodes 1024 --state-gb 180 --step-s 8 --stall-s 0.6 --failures 3.8"""


def plan(
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Nodes of the job.")] = None,
    per_rack: Annotated[int | None, typer.Option("--per-rack", min=1, help="Nodes of a rack.")] = None,
    topology: Annotated[
        Path | None, typer.Option("--topology", metavar="FILE", help="A cluster instead: JSON of a Topology.")
    ] = None,
    code: Annotated[
        str, typer.Option("--code", metavar="K+M", help="Data and parity parts, or [bold]auto[/].")
    ] = "auto",
    losses: Annotated[int, typer.Option("--losses", min=1, max=16, help="Most nodes lost at once.")] = 4,
    must_survive: Annotated[
        list[str] | None, typer.Option("--must-survive", metavar="KIND", help="Fail if losing a rack is not survived.")
    ] = None,
    copies: Annotated[
        int, typer.Option("--copies", min=1, help="Nodes that hold the same state (data-parallel ones).")
    ] = 1,
    copied: Annotated[
        float, typer.Option("--copied", min=0, max=1, help="Share of a node's state that they hold alike.")
    ] = 1.0,
    state_gb: Annotated[float | None, typer.Option("--state-gb", min=0, help="State of a node, GB.")] = None,
    step_s: Annotated[float | None, typer.Option("--step-s", min=1e-6, help="Seconds of a step.")] = None,
    stall_s: Annotated[float, typer.Option("--stall-s", min=0, help="How long a snapshot stops training, s.")] = 0.0,
    protect_s: Annotated[float, typer.Option("--protect-s", min=0, help="Until a snapshot is protected, s.")] = 0.0,
    restart_s: Annotated[float, typer.Option("--restart-s", min=0, help="From a failure to the next step, s.")] = 60.0,
    failures: Annotated[float, typer.Option("--failures", min=1e-9, help="Failures of one node in 1000 days.")] = 3.8,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON.")] = False,
) -> None:
    """Show which nodes would protect each other, what that survives, and how often to take a snapshot."""
    from evermesh.launcher.snapshot_plan import Copies, FailureRates, plan_snapshots, read_nodes

    if (nodes is None) == (topology is None):
        raise typer.BadParameter("give either --nodes N or --topology FILE.")
    members = read_nodes(topology, nodes or 0, per_rack)
    rates = FailureRates(step_s, stall_s, protect_s, restart_s, failures) if step_s else None
    if copies > len(members):
        raise typer.BadParameter(f"--copies {copies}, but there are {len(members)} nodes.")
    alike = Copies(copies, copied) if copies > 1 else None
    found = plan_snapshots(members, code, losses, must_survive or (), rates, alike)
    if as_json:
        print(json.dumps(asdict(found), indent=1))
        return
    _print(found, state_gb)


def _print(found: "SnapshotPlan", state_gb: float | None) -> None:
    console = Console()

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    stripes = ", ".join(f"{number} x {code}" for code, number in found.stripes.items())
    line(f"{found.nodes} nodes in stripes: {stripes}; memory for parity +{found.memory:.0%}")
    if found.coded < 1:
        line(f"{found.coded:.0%} of the state of a node is coded, once; of the rest its stripe has copies enough")
    else:
        line("all state is coded; what data-parallel nodes of a stripe hold alike would not be: see --copies")
    if state_gb is not None:
        total = state_gb * (2 + 2 * found.memory)
        line(f"memory of a node: {total:,.1f} GB (two snapshots of {state_gb:,.1f} GB and their parity)")
    for guarantee in found.guarantees:
        line(guarantee)
    for warning in found.warnings:
        line(f"warning: {warning}")
    lost = [str(number) for number in range(1, found.losses + 1)]
    table = Table("recovered after the loss of", "memory", *lost, box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, memory, odds in found.schemes:
        table.add_row(name, f"+{memory:.0%}", *map(_odds, odds))
    for name, odds in found.domains.items():
        table.add_row(f"whole {name}s, in these stripes", "", *map(_odds, odds))
    console.print(table)
    if found.interval:
        for text in found.interval.lines:
            line(text)


def _odds(value: float) -> str:
    return "1" if value == 1 else f"{value:.4f}" if value < 0.9999 else f"1 - {1 - value:.0e}"
