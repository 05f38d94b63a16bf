"""``evermesh simulate``: one step replayed on a cluster that does not exist, with what goes wrong there."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from evermesh.launcher.simulating import Simulated

EXAMPLES = """[bold]Examples[/]

  evermesh simulate deploy/jobs/quickstart.yaml --slow 2=0.7

  evermesh simulate lengths.txt.gz --hdp 64 --ranks-per-node 8 --slow 5=0.7

  evermesh simulate plan.json --cost cost.json --lose 3@0.8 --trace trace.json"""

_SLOWEST = 3
_BLOCKED = 8


def simulate(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN.json|JOB.yaml|LENGTHS.txt",
            help="A plan (of evermesh plan --json, or of another system), a job, or a file with one length per line.",
            show_default=False,
        ),
    ],
    batch: Annotated[int, typer.Option("--batch", min=1, help="Which batch of the job.")] = 1,
    cost: Annotated[
        Path | None, typer.Option("--cost", metavar="FILE", help="Coefficients of a cost model, JSON.")
    ] = None,
    hdp: Annotated[int | None, typer.Option("--hdp", min=1, help="HDP ranks.")] = None,
    tp: Annotated[int | None, typer.Option("--tp", min=1, help="Workers that share a model.")] = None,
    pp: Annotated[int | None, typer.Option("--pp", min=1, help="Stages of a pipeline.")] = None,
    capacity: Annotated[
        int | None, typer.Option("--capacity", min=1, help="Tokens of a micro-batch on a rank.")
    ] = None,
    ranks_per_node: Annotated[int | None, typer.Option("--ranks-per-node", min=1, help="Workers of a node.")] = None,
    slow: Annotated[
        list[str] | None, typer.Option("--slow", metavar="RANK=FACTOR[@S]", help="A slow HDP rank, from second S on.")
    ] = None,
    slow_link: Annotated[
        list[str] | None, typer.Option("--slow-link", metavar="A-B=FACTOR", help="A slow link from rank A to rank B.")
    ] = None,
    lose: Annotated[
        list[str] | None, typer.Option("--lose", metavar="RANK@S", help="An HDP rank that is lost at second S.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="Write a trace for ui.perfetto.dev.")
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Write a picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All figures as JSON.")] = False,
) -> None:
    """Replay one step and say how long it takes, who waits for whom, and what a fault costs."""
    from evermesh.launcher import planning, simulating
    from evermesh.launcher.plan_picture import plan_png
    from evermesh.parallelism.simulator import chrome_trace

    degrees = planning.Degrees(hdp, tp, pp, capacity, ranks_per_node)
    case = planning.read_case(source, degrees, planning.read_cost(cost), batch)
    found = simulating.run(case, simulating.Faults(slow or (), slow_link or (), lose or ()))
    timeline = found.outcome.timeline
    if trace:
        trace.write_bytes(chrome_trace(timeline))
    if png:
        plan_png(found.picture, timeline, png, title=f"simulated step of {source.name}")
    if as_json:
        print(json.dumps(found.as_json()))
        return
    console = Console()
    for line in _lines(found):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    for name, path in (("trace", trace), ("picture", png)):
        if path:
            console.print(f"{name}: {path}", highlight=False, soft_wrap=True, markup=False)


def _lines(found: "Simulated") -> list[str]:
    from evermesh.launcher.plan_picture import headline, seconds

    timeline, certificate = found.outcome.timeline, found.case.plan.certificate
    undisturbed = found.undisturbed.timeline.makespan_s
    lines = [headline(found.case.plan)]
    bound = f"bound {seconds(certificate.lower_bound_s)} ({certificate.binding})"
    if found.outcome.lost:
        lines.append(f"makespan {seconds(undisturbed)} when nothing goes wrong, {bound}")
        return lines + _loss(found)
    ratio = timeline.makespan_s / certificate.lower_bound_s if certificate.lower_bound_s else 1.0
    slower = "" if timeline.makespan_s == undisturbed else f"; {seconds(undisturbed)} when nothing goes wrong"
    lines.append(f"makespan {seconds(timeline.makespan_s)}, {bound}, ratio {ratio:.3f}{slower}")
    busy = timeline.busy_s()
    total = max(timeline.makespan_s * len(busy), 1e-300)
    waits = sorted(timeline.waited_s().items(), key=lambda item: -item[1])
    causes = ", ".join(f"{cause} {waited / total:.1%}" for cause, waited in waits)
    lines.append(f"busy {sum(busy) / total:.1%} of all ranks' time; waiting: {causes or 'none'}")
    slowest = sorted(range(len(busy)), key=lambda rank: (-busy[rank], rank))[:_SLOWEST]
    lines.append("most work: " + ", ".join(f"{timeline.labels[rank]} {seconds(busy[rank])}" for rank in slowest))
    return lines


def _loss(found: "Simulated") -> list[str]:
    from evermesh.launcher.plan_picture import seconds

    outcome, labels = found.outcome, found.outcome.timeline.labels
    names = ", ".join(labels[rank] for rank in outcome.lost)
    lines = [
        f"lost: {names}; the step cannot end. Not done: {outcome.undone_micro_batches} micro-batches, "
        f"{outcome.undone_tokens:,} tokens"
    ]
    first = sorted(outcome.blocked, key=lambda blocked: (blocked.since_s, blocked.rank))
    for blocked in first[:_BLOCKED]:
        since = seconds(blocked.since_s)
        where = "sums gradients" if blocked.micro_batch is None else f"micro-batch {blocked.micro_batch}"
        behind = "" if blocked.root == blocked.for_rank else f", behind it {labels[blocked.root]}"
        lines.append(f"  {labels[blocked.rank]} waits from {since} on, {where}, for {labels[blocked.for_rank]}{behind}")
    if len(first) > _BLOCKED:
        lines.append(f"  and {len(first) - _BLOCKED} more")
    if found.time_lost_s is None or found.repeated_s is None:
        return [
            *lines,
            "the ranks that are left cannot repeat the step: their capacity or the layout does not allow it",
        ]
    lines.append(
        f"repeated on the ranks that are left: {seconds(found.repeated_s)}; time lost {seconds(found.time_lost_s)}, "
        "and what it takes to notice and to start again"
    )
    return lines
