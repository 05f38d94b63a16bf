"""``evermesh traffic plan``."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

EXAMPLES = """[bold]Examples[/]

  evermesh traffic plan job.yaml --topology cluster.yaml --settings out

  evermesh traffic plan job.yaml --topology cluster.yaml --failed leaf0-spine3

  evermesh traffic plan job.yaml --topology cluster.yaml --registry loads.json

[dim]A topology to start from: deploy/topologies/leaf-spine.yaml[/]"""


def plan(
    job: Annotated[Path, typer.Argument(metavar="JOB.yaml", help="A job with its layout.", show_default=False)],
    topology: Annotated[
        Path, typer.Option("--topology", metavar="FILE", help="Nodes, leaves and spines, .json or .yaml.")
    ],
    nodes: Annotated[
        str | None, typer.Option("--nodes", metavar="NAME,...", help="Nodes of the job; else all.")
    ] = None,
    failed: Annotated[
        list[str] | None,
        typer.Option("--failed", metavar="CABLE", help="Broken: LEAF-SPINE, NODE/CARD/PORT, or a switch."),
    ] = None,
    keep_order: Annotated[bool, typer.Option("--keep-order", help="Nodes stay in the order of the file.")] = False,
    algorithm: Annotated[
        Literal["ring", "tree"], typer.Option("--algorithm", help="Of all-reduces, as NCCL does them.")
    ] = "ring",
    no_pxn: Annotated[bool, typer.Option("--no-pxn", help="Messages leave through the card of the sender.")] = False,
    streams: Annotated[
        int, typer.Option("--streams", min=1, max=64, help="Queue pairs of a connection on each port.")
    ] = 1,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Hashes to compare with.")] = 20,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Steps to take the mean of.")] = 2,
    registry: Annotated[
        Path | None, typer.Option("--registry", metavar="FILE", help="Loads of other jobs; this one is added.")
    ] = None,
    step_s: Annotated[float | None, typer.Option("--step-s", min=1e-6, help="Seconds of a step.")] = None,
    settings: Annotated[
        Path | None, typer.Option("--settings", metavar="DIR", help="Write hostfile, environments and paths there.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON.")] = False,
) -> None:
    """Spread the traffic of a job over its network, and show what links carry with a plan and without one."""
    from evermesh.launcher import traffic_report as report
    from evermesh.launcher.traffic_plan import TrafficAsked, plan_traffic_of
    from evermesh.launcher.traffic_registry import Registry

    asked = TrafficAsked(
        job=job,
        topology=topology,
        nodes=tuple(nodes.split(",")) if nodes else (),
        failed=tuple(failed or ()),
        reorders=not keep_order,
        algorithm=algorithm,
        pxn=not no_pxn,
        parts=streams,
        seeds=seeds,
        batches=batches,
        registry=registry,
        step_s=step_s,
    )
    found = plan_traffic_of(asked, Console(stderr=True))
    if settings is not None:
        files = report.write_settings(found, settings)
        Console(stderr=True).print(
            f"{settings}: {', '.join(files[:6])}{', ...' if len(files) > 6 else ''}", soft_wrap=True
        )
    if registry is not None:
        Registry.read(registry).write(found.job, report.own_loads(found), found.wiring, found.step_s)
    if as_json:
        print(report.as_json(found))
        return
    console = Console()
    console.print(report.headline(found), highlight=False, soft_wrap=True)
    console.print(report.loads_table(found))
    console.print()
    console.print(report.rails_table(found))
    console.print()
    for line in (*report.lines_of(found), "", *report.parts_lines(found)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
