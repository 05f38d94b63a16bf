"""What ``evermesh status`` and ``evermesh nodes`` print."""

import json
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evermesh.fault.events import Finding
from evermesh.launcher.client import Client
from evermesh.launcher.contact import read_contact
from evermesh.launcher.controller.status import JobStatus, NodeStatus, RankStatus
from evermesh.launcher.errors import ControllerLost
from evermesh.launcher.finding import FoundJob
from evermesh.launcher.hardware_tables import in_short
from evermesh.launcher.progress import duration
from evermesh.launcher.run_directory import Run
from evermesh.launcher.terminal import print_table

COLOURS = {
    "training": "green",
    "finished": "green",
    "ready": "green",
    "done": "green",
    "stopped": "yellow",
    "stopping": "yellow",
    "regrouping": "yellow",
    "cut off": "yellow",
    "recovering": "red",
    "waiting": "red",
    "failed": "red",
    "lost": "red",
    "refused": "red",
}
_MOST_RANKS = 64


def show_status(job: FoundJob, *, as_json: bool) -> None:
    """Print what is known about ``job``."""
    if job.run is None:
        _show_script(job, as_json)
    elif job.run.is_alive():
        _show_living(job.run, as_json)
    else:
        _show_ended(job.run, as_json)


def jobs_table(jobs: Sequence[FoundJob]) -> Table:
    """Living jobs, one per row."""
    table = _table("name", "kind", "process", "running for", "directory")
    for job in jobs:
        running = duration(time.time() - job.started_s) if job.started_s else ""
        table.add_row(job.name, "run" if job.run else "script", str(job.pid), running, str(job.directory))
    return table


def nodes_table(nodes: Sequence[NodeStatus], findings: Sequence[Finding] = ()) -> Table:
    """Nodes, one per row, and what is found there now."""
    table = _table("node", "state", "host", "address", "agent", "lease", "ranks", "memory free", "hardware")
    for node in nodes:
        lease = "" if node.lease_left_s is None else f"{node.lease_left_s:.1f} s"
        memory = "" if node.memory_free_bytes is None else f"{node.memory_free_bytes / 2**30:.1f} GiB"
        ranks = "spare" if node.is_spare else _ranges(node.ranks)
        aside = " [yellow]aside[/]" if node.aside is not None else ""
        found = "".join(f" [red]{kind}[/]" for kind in dict.fromkeys(one.kind for one in findings if _is_at(one, node)))
        state = coloured(node.state) + aside + found
        known = (node.host, node.address, str(node.pid or ""), lease, ranks, memory)
        table.add_row(node.node, state, *known, in_short(node.hardware))
    return table


def ranks_table(ranks: Sequence[RankStatus]) -> Table:
    """Ranks, one per row; of very many the slowest."""
    table = _table("rank", "node", "process", "state", "step", "step time", "compute")
    slowest = sorted(ranks, key=lambda rank: -(rank.compute_s or 0.0))[:_MOST_RANKS]
    longest_s = max((rank.compute_s or 0.0 for rank in slowest), default=0.0)
    for rank in sorted(slowest, key=lambda rank: rank.rank):
        table.add_row(
            str(rank.rank),
            rank.node,
            str(rank.pid or ""),
            coloured(rank.state),
            "" if rank.step is None else str(rank.step),
            "" if rank.step_s is None else f"{rank.step_s:.3f} s",
            "" if rank.compute_s is None else f"{rank.compute_s:.3f} s {_bar(rank.compute_s, longest_s)}",
        )
    if len(ranks) > _MOST_RANKS:
        table.caption = f"the {_MOST_RANKS} of {len(ranks)} ranks that computed longest"
    return table


def headline(status: JobStatus) -> Text:
    """State, step, loss and speed on two lines."""
    steps = f"step {status.step or 0}" + (f" of {status.steps}" if status.steps else "")
    loss = f" | loss {status.loss:.4f}" if status.loss is not None else ""
    speed = f" | {status.tokens_per_s:,.0f} tokens/s" if status.tokens_per_s is not None else ""
    left = f" | {duration(status.time_left_s)} left" if status.time_left_s is not None else ""
    return Text.assemble(
        (status.name, "bold"),
        "  ",
        (status.state, COLOURS.get(status.state, "cyan")),
        f" ({status.reason})\n{steps}{loss}{speed}{left} | attempt {status.generation}, "
        f"{status.restarts} of {status.max_restarts} restarts | running for {duration(time.time() - status.started_s)}",
    )


def snapshot_line(status: JobStatus) -> Text:
    """What is in memory, and what a restart would lose now."""
    found = status.snapshot
    if found is None:
        return Text("no step yet: a restart would lose nothing", style="dim")
    lost = f"a restart loses {_steps(found.lost_steps)} ({found.lost_s:.1f} s), from {found.source}"
    if found.protection != "protected":
        lost += f"; a lost node {_steps(found.lost_steps_of_node)}"
    colour = "green" if found.source == "memory" else "yellow"
    if found.step is None:
        return Text.assemble("no snapshot in memory" if found.is_on else "snapshots are off", " | ", (lost, colour))
    num_bytes = max((node.snapshot_bytes for node in status.nodes), default=0)
    every = f", one every {_steps(found.every)}" if found.every is not None else ""
    protection = "" if found.protection == "none" else f", {found.protection}"
    return Text.assemble(
        f"snapshot of step {found.step} in memory, {_steps(found.age_steps or 0)} ({found.age_s or 0.0:.1f} s) old{every}, "
        f"{num_bytes / 2**20:,.1f} MiB per node{protection} | {found.committed} complete, {found.skipped} skipped, "
        f"{found.lost} lost | ",
        (lost, colour),
    )


def findings_lines(status: JobStatus) -> list[Text]:
    """What is found now, one line for each."""
    return [
        Text.assemble((finding.kind, "bold red"), f"  {finding.text} ({finding.confidence:.0%} sure)")
        for finding in status.findings
    ]


def aside_lines(status: JobStatus) -> list[Text]:
    """What the job does without, and why: nodes that are drained, cordoned or set aside, and a rack that holds too much."""
    aside = [f"aside: {node.aside}" for node in status.nodes if node.aside is not None]
    return [Text(line, style="yellow") for line in ([status.lost_rack] if status.lost_rack else []) + aside]


def _is_at(finding: Finding, node: NodeStatus) -> bool:
    """Whether a finding names a node, or ranks on it."""
    ranks = {finding.rank, *(finding.link or ())} & set(node.ranks)
    return finding.node in (node.node, node.known_as or node.node) or bool(ranks)


def _steps(count: int) -> str:
    return f"{count:,} step{'s' * (count != 1)}"


def coloured(state: str) -> str:
    """A state in its colour."""
    return f"[{COLOURS.get(state, 'cyan')}]{state}[/]"


def _show_living(run: Run, as_json: bool) -> None:
    try:
        status = Client(run, patience_s=3.0).status()
    except ControllerLost:
        if run.is_alive():
            raise
        _show_ended(run, as_json)
        return
    if as_json:
        print(status.model_dump_json(indent=1))
        return
    console = Console()
    console.print(headline(status), highlight=False, soft_wrap=True)
    console.print(snapshot_line(status), highlight=False, soft_wrap=True)
    for line in (*findings_lines(status), *aside_lines(status)):
        console.print(line, highlight=False, soft_wrap=True)
    print_table(nodes_table(status.nodes, status.findings))
    print_table(ranks_table(status.ranks))
    console.print(
        f"directory {run.directory}\ndashboard {read_contact(run.directory)}  (evermesh dashboard {run.directory} opens it)",
        highlight=False,
        soft_wrap=True,
    )


def _show_ended(run: Run, as_json: bool) -> None:
    state = run.state()
    if as_json:
        print(
            json.dumps({"name": run.name, "directory": str(run.directory), **state.model_dump(mode="json")}, indent=1)
        )
        return
    console = Console()
    ended = f" at {state.ended:%Y-%m-%d %H:%M:%S} UTC" if state.ended else ""
    attempts = "1 attempt" if state.attempt == 1 else f"{state.attempt} attempts"
    console.print(
        f"[bold]{run.name}[/]  {coloured(run.status())}{ended}, {attempts}, {run.directory}",
        highlight=False,
    )
    for line in (state.error or "").splitlines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if run.status() in ("stopped", "failed", "died"):
        console.print(f"go on with: evermesh resume {run.directory}", markup=False, highlight=False, soft_wrap=True)


def _show_script(job: FoundJob, as_json: bool) -> None:
    if as_json:
        print(json.dumps(job.as_row(), indent=1))
        return
    print_table(jobs_table([job]))
    print(f"command: {' '.join(job.command)}\nits output: evermesh logs {job.directory}")


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, header_style="bold", pad_edge=False)


def _bar(value: float, longest: float, width: int = 10) -> str:
    return "▮" * round(width * value / longest) if longest > 0 else ""


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3`` for consecutive numbers."""
    return ", ".join(_runs(numbers))


def _runs(numbers: Sequence[int]) -> Iterator[str]:
    start = previous = None
    for number in [*numbers, None]:
        if previous is not None and number != previous + 1:
            yield str(start) if start == previous else f"{start}-{previous}"
            start = number
        start = number if start is None else start
        previous = number
