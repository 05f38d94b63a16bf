"""``evermesh nodes``, ``cordon``, ``uncordon`` and ``drain``: which nodes jobs have, may have, and are to leave."""

import json
from pathlib import Path
from typing import Annotated

import typer

from evermesh.launcher.commands.watching import Job, Runs

Node = Annotated[
    str,
    typer.Argument(
        metavar="NODE",
        help="HOST/PLACE as `evermesh nodes --cluster` lists it, a HOST as a whole, an address, or node-N of this machine.",
    ),
]
Store = Annotated[
    str | None,
    typer.Option(
        "--store", metavar="PLACE", help="Folder or URL of the cluster store; default: EVERMESH_CLUSTER, else yours."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON instead of a table.")]

NODES_EXAMPLES = """[bold]Examples[/]

  evermesh nodes quickstart --json

  evermesh nodes quickstart --settings [dim]# what NCCL and gloo are told, and why[/]

  evermesh nodes --cluster             [dim]# all nodes of which any job has learnt something[/]

  evermesh nodes --why gpu17/10.0.0.17 [dim]# what speaks against it[/]"""

CORDON_EXAMPLES = """[bold]Examples[/]

  evermesh cordon gpu17 --because "fan 3 fails" --for 2h

  evermesh cordon node-1 --because "tests of the disk"

Jobs place no ranks there from their next attempt on; `evermesh drain` has one leave it now."""

UNCORDON_EXAMPLES = """[bold]Examples[/]

  evermesh uncordon gpu17

What spoke against it until now is forgiven."""

DRAIN_EXAMPLES = """[bold]Examples[/]

  evermesh drain node-1

  evermesh drain node-1 --run quickstart --because "to be repaired"

The node is cordoned as well: `evermesh uncordon` allows it again."""


def nodes(
    job: Job = None,
    runs: Runs = Path("runs"),
    as_json: Json = False,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Nodes of the cluster store instead, with evidence and cordons.")
    ] = False,
    settings: Annotated[
        bool, typer.Option("--settings", help="Variables of NCCL and gloo that ranks of each node are given, and why.")
    ] = False,
    why: Annotated[str | None, typer.Option("--why", metavar="NODE", help="What speaks against this node.")] = None,
    store: Store = None,
) -> None:
    """List the nodes of a job: host, state, lease, ranks, memory, cards, GPUs, rack. If no job lives: those of the cluster
    store."""
    from evermesh.launcher.client import Client
    from evermesh.launcher.cluster_nodes import show_cluster, show_why
    from evermesh.launcher.finding import find_run, living_jobs
    from evermesh.launcher.hardware_tables import settings_table
    from evermesh.launcher.status_tables import nodes_table
    from evermesh.launcher.terminal import print_table

    if why is not None:
        show_why(store, why, as_json=as_json)
        return
    if cluster or (job is None and not any(found.run for found in living_jobs())):
        show_cluster(store, as_json=as_json)
        return
    status = Client(find_run(job, runs), patience_s=1.0).status()
    if as_json:
        print(json.dumps([node.model_dump(mode="json") for node in status.nodes], indent=1))
    elif settings:
        print_table(settings_table(status.nodes))
    else:
        print_table(nodes_table(status.nodes, status.findings))


def cordon(
    node: Node,
    because: Annotated[str, typer.Option("--because", metavar="TEXT", help="Why, for whoever reads it.")],
    lasting: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="30m, 2h, 7d; default: until it is uncordoned.")
    ] = None,
    store: Store = None,
) -> None:
    """Keep jobs from a node: attempts that begin from now on do not use it."""
    from evermesh.launcher.cluster_nodes import cordon_node

    print(cordon_node(store, node, because, lasting))


def uncordon(
    node: Node,
    because: Annotated[str, typer.Option("--because", metavar="TEXT", help="Why, for whoever reads it.")] = "",
    store: Store = None,
) -> None:
    """Allow jobs a node again, and forgive what spoke against it."""
    from evermesh.launcher.cluster_nodes import uncordon_node

    print(uncordon_node(store, node, because))


def drain(
    node: Annotated[
        str, typer.Argument(metavar="NODE", help="As `evermesh nodes` lists it, HOST/PLACE, or an address.")
    ],
    job: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Which job; default: the one that lives.")
    ] = None,
    runs: Runs = Path("runs"),
    because: Annotated[str, typer.Option("--because", metavar="TEXT", help="Why.")] = "asked for",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when ranks train without it.")] = True,
) -> None:
    """Have a job leave a node behind a step and go on elsewhere from memory; nothing is lost, and no job uses it again."""
    from evermesh.launcher.draining import drain_node
    from evermesh.launcher.finding import find_run

    print(drain_node(find_run(job, runs), node, because, wait=wait))
