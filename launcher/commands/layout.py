"""``evermesh layout``: the layouts with which a model trains fastest on a cluster."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from evermesh.launcher.layouts import Source
    from evermesh.parallelism.layout.device import Device
    from evermesh.parallelism.topology import Topology

EXAMPLES = """[bold]Examples[/]

  evermesh layout deploy/jobs/quickstart.yaml --gpus 8

  evermesh layout model.yaml --nodes 16 --context 8192

  evermesh layout model.yaml --nodes 128 --lengths lengths.txt

A model is a file with the keys of train.model."""

DeviceChoice = Literal["h100", "h200", "a100", "cpu"]
_GIB = 2**30


def layout(
    source: Annotated[
        Path,
        typer.Argument(metavar="JOB.yaml|MODEL.yaml", help="A job, or the sizes of a model.", show_default=False),
    ],
    nodes: Annotated[int | None, typer.Option("--nodes", min=1, help="Nodes; by default those of the job.")] = None,
    gpus: Annotated[int | None, typer.Option("--gpus", min=1, help="Devices of a node.", show_default="8")] = None,
    topology: Annotated[
        Path | None, typer.Option("--topology", metavar="FILE", help="Nodes with their links, .json or .yaml.")
    ] = None,
    lengths: Annotated[
        Path | None, typer.Option("--lengths", metavar="FILE", help="One length of a sequence per line.")
    ] = None,
    context: Annotated[int | None, typer.Option("--context", min=1, help="Longest sequence, in tokens.")] = None,
    batch_tokens: Annotated[int | None, typer.Option("--batch-tokens", min=1, help="Tokens of a step.")] = None,
    batches: Annotated[int, typer.Option("--batches", min=1, help="Steps to plan.")] = 2,
    device: Annotated[DeviceChoice | None, typer.Option("--device", help="Kind of device.")] = None,
    teraflops: Annotated[
        float | None, typer.Option("--flops", min=1e-6, help="Its sustained TFLOP/s in matrix products.")
    ] = None,
    memory: Annotated[float | None, typer.Option("--memory", min=1e-6, help="Its memory, in GiB.")] = None,
    convention: Annotated[
        Literal["causal", "full"], typer.Option("--convention", help="Pairs of tokens that the MFU counts.")
    ] = "causal",
    top: Annotated[int, typer.Option("--top", min=1, help="Layouts to show.")] = 5,
    planned: Annotated[int, typer.Option("--planned", min=0, help="Layouts to plan; 0: the formula ranks.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text.")] = False,
) -> None:
    """Find the fastest layouts that fit, and say why they are."""
    from evermesh.launcher.layout_report import as_json as to_json
    from evermesh.launcher.layout_report import headline, lines_of, table_of, yaml_of
    from evermesh.launcher.layouts import LengthsAsked, Source
    from evermesh.launcher.topology_file import read_topology
    from evermesh.parallelism.layout.search import search_layouts

    given = Source.read(source)
    options = given.options(_device(given, device, teraflops, memory))
    options = options.model_copy(update={"convention": convention, "top": top, "planned": planned})
    cluster = read_topology(topology) if topology else _cluster(given, options.device, nodes, gpus)
    asked = LengthsAsked(lengths, context, batch_tokens, batches)
    sample, vocabulary = given.lengths(asked, Console(stderr=True))
    shape = given.model.shape(vocabulary)
    ranked = search_layouts(shape, cluster, sample, options)
    if as_json:
        print(to_json(ranked, cluster))
        return
    console = Console()
    console.print(headline(shape, cluster, sample, options), highlight=False, soft_wrap=True)
    console.print(table_of(ranked))
    for line in lines_of(ranked, cluster, options):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print()
    console.print(yaml_of(ranked[0]), highlight=False, markup=False, soft_wrap=True, end="")


def _device(source: "Source", name: DeviceChoice | None, teraflops: float | None, memory_gib: float | None) -> "Device":
    """The device that was asked for, or that of the job, with the given rate and memory."""
    from evermesh.parallelism.layout.device import DEVICES

    found = DEVICES[name] if name else source.options(None).device
    changed: dict[str, float | int] = {}
    if teraflops is not None:
        rate = teraflops * 1e12
        changed = {
            "flops_per_s": rate,
            "attention_flops_per_s": rate * found.attention_flops_per_s / found.flops_per_s,
            "peak_flops_per_s": max(rate, found.peak_flops_per_s),
        }
    if memory_gib is not None:
        changed["memory_bytes"] = int(memory_gib * _GIB)
    return found.model_copy(update=changed)


def _cluster(source: "Source", device: "Device", nodes: int | None, gpus: int | None) -> "Topology":
    """Nodes that are alike; as many as the job has where nobody says."""
    job = source.job
    nodes = nodes or (job.nodes if job else 1)
    return device.topology(nodes, gpus or (job.workers // job.nodes if job else 8))
