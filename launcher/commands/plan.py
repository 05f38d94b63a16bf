"""``evermesh plan``: one batch, planned and drawn, without training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from evermesh.launcher.planning import Case

EXAMPLES = """[bold]Examples[/]

  evermesh plan deploy/jobs/quickstart.yaml    [dim]# its first batch[/]

  evermesh plan deploy/jobs/quickstart.yaml --batch 7 --workers 6 --png plan.png

  evermesh plan lengths.txt.gz --workers 64 --capacity 32768

  evermesh plan deploy/jobs/racks.yaml --lengths deploy/jobs/lengths.txt

  evermesh plan --lengths FILE --hdp 1536 --tp 8 --cost cost.json --json OUT"""

_MOST_ROWS = 64


def plan(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[JOB.yaml|LENGTHS.txt]", help="A job, or a file with one length per line.", show_default=False
        ),
    ] = None,
    lengths: Annotated[
        Path | None,
        typer.Option("--lengths", metavar="FILE", help="A file of lengths; of a job: draw its batch from them."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Which batch of the job.")] = 1,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Plan for this many workers.")] = None,
    hdp: Annotated[int | None, typer.Option("--hdp", min=1, help="HDP ranks.")] = None,
    tp: Annotated[int | None, typer.Option("--tp", min=1, help="Workers that share a model.")] = None,
    pp: Annotated[int | None, typer.Option("--pp", min=1, help="Stages of a pipeline.")] = None,
    capacity: Annotated[
        int | None, typer.Option("--capacity", min=1, help="Tokens of one micro-batch on a rank.")
    ] = None,
    ranks_per_node: Annotated[int | None, typer.Option("--ranks-per-node", min=1, help="Workers of a node.")] = None,
    cost: Annotated[
        Path | None, typer.Option("--cost", metavar="FILE", help="Coefficients of a cost model, JSON.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", metavar="NAME", help="Plan as a peer: static, packed, bytescale-1, bytescale-2, wlb."
        ),
    ] = None,
    why: Annotated[
        int | None, typer.Option("--why", metavar="SEQUENCE", help="Say why this sequence got its ranks.")
    ] = None,
    convention: Annotated[
        Literal["causal", "full"], typer.Option("--convention", help="Pairs of tokens that FLOPs count.")
    ] = "causal",
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Write the picture.")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write a trace for ui.perfetto.dev.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the whole plan as JSON; - prints it.")
    ] = None,
) -> None:
    """Plan one batch and show which ranks run which micro-batch when."""
    from evermesh.launcher import planning

    of_job = source is not None and source.suffix in {".yaml", ".yml"}
    if (source is None and lengths is None) or (source is not None and lengths is not None and not of_job):
        raise typer.BadParameter("name a job, a file of lengths, or --lengths FILE. Only a job goes with --lengths.")
    degrees = planning.Degrees(_hdp(source, hdp, workers, (tp or 1) * (pp or 1)), tp, pp, capacity, ranks_per_node)
    found = planning.read_cost(cost)
    if source is None:
        assert lengths is not None
        case = planning.case_of_lengths(lengths, degrees, found, baseline)
    else:
        case = planning.read_case(source, degrees, found, batch, baseline, lengths)
    if json_file == Path("-"):
        print(case.plan.to_document().decode())
        return
    _print(case, why, convention)
    if json_file:
        json_file.write_bytes(case.plan.to_document())
    if png or trace:
        _draw(case, png, trace, (source or lengths or Path()).name)
    for name, path in (("plan", json_file), ("trace", trace), ("picture", png)):
        if path:
            Console().print(f"{name}: {path}", highlight=False, soft_wrap=True, markup=False)


def _hdp(source: Path | None, hdp: int | None, workers: int | None, share_a_model: int) -> int | None:
    """HDP ranks, as they are given or as ``workers`` give them; None: as the source says."""
    if workers is None:
        return hdp
    if hdp is not None:
        raise typer.BadParameter("--workers and --hdp say the same thing twice. Leave one out.")
    if source is not None and source.suffix in {".yaml", ".yml"}:
        from evermesh.launcher.job_file import load_job

        return load_job(source).train.layout.fitted_to(workers).hdp
    if workers % share_a_model:
        raise typer.BadParameter(f"--workers {workers} is not a multiple of tp x pp = {share_a_model}.")
    return workers // share_a_model


def _print(case: "Case", why: int | None, convention: Literal["causal", "full"]) -> None:
    from evermesh.launcher.plan_picture import certificate_line, headline, offload_line, plan_text
    from evermesh.parallelism.planner.why import why_this_ring

    console = Console()

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True, markup=False)

    say(headline(case.plan))
    if why is not None:
        for line in why_this_ring(case.plan, why, case.layout, case.cost, case.pool):
            say(line)
    elif len(case.plan.ranks) * case.layout.pp <= _MOST_ROWS:
        console.print(plan_text(case.plan, case.timeline(), width=console.width), soft_wrap=True)
    name = case.plan.planner
    say(("" if name == "hybrid" else f"{name}: ") + certificate_line(case.plan))
    if (moved := offload_line(case.plan)) is not None:
        say(moved)
    if case.shape is not None:
        flops = case.shape.training_flops(case.plan.lengths, convention)
        say(f"{flops / 1e15:.4g} PFLOP in the {convention} convention; all times are planned, not measured")


def _draw(case: "Case", png: Path | None, trace: Path | None, name: str) -> None:
    from evermesh.launcher.plan_picture import plan_png
    from evermesh.parallelism.simulator import chrome_trace

    timeline = case.timeline()
    if trace:
        trace.write_bytes(chrome_trace(timeline))
    if png:
        plan_png(case.plan, timeline, png, title=f"batch plan of {name}")
