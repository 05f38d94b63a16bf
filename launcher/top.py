"""``evermesh top``: a job, live, in a terminal."""

import time
from collections import deque
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from evermesh.fault.events import Event, read_events
from evermesh.launcher.client import Client
from evermesh.launcher.errors import ControllerLost
from evermesh.launcher.run_directory import Run
from evermesh.launcher.status_tables import (
    aside_lines,
    coloured,
    findings_lines,
    headline,
    nodes_table,
    ranks_table,
    snapshot_line,
)
from evermesh.runtime.telemetry import StepReport, read_telemetry

_EVERY_S = 1.0
_EVENTS = 6
_STEPS = 60
_LEVELS = "▁▂▃▄▅▆▇█"


def watch(run: Run, *, once: bool = False) -> None:
    """Show ``run`` until it ends or Ctrl-C; with ``once``, once.

    Raises:
        ControllerLost: it does not live.
    """
    console, client = Console(), Client(run)
    first = screen(run, client)
    if once or not console.is_terminal:
        console.print(first)
        return
    with Live(first, console=console, screen=True, auto_refresh=False) as live:
        while run.state().state == "running":
            time.sleep(_EVERY_S)
            live.update(_screen_or_why(run, client), refresh=True)
    console.print(f"{run.name}: {coloured(run.status())}", highlight=False)


def screen(run: Run, client: Client) -> RenderableType:
    """Everything that fits on a screen."""
    status = client.status()
    return Group(
        headline(status),
        snapshot_line(status),
        *findings_lines(status),
        *aside_lines(status),
        Text(),
        *_curves(run.telemetry),
        Text(),
        nodes_table(status.nodes, status.findings),
        Text(),
        ranks_table(status.ranks),
        Text(),
        *(_event_line(event) for event in _newest_events(run.events)),
    )


def spark(values: list[float]) -> str:
    """Values as a line of blocks, lowest to highest."""
    low, high = min(values), max(values)
    scale = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(_LEVELS[round((value - low) * scale)] for value in values)


def _screen_or_why(run: Run, client: Client) -> RenderableType:
    try:
        return screen(run, client)
    except ControllerLost as error:
        return Text(str(error), style="yellow")


def _curves(telemetry: Path) -> list[Text]:
    reports = read_telemetry(telemetry)[-_STEPS:] if telemetry.is_file() else []
    if not reports:
        return [Text("no step yet", style="dim")]
    return [
        _curve("loss", [report.loss for report in reports], reports[-1].loss, ".4f", reports),
        _curve("tokens/s", [report.tokens_per_s for report in reports], reports[-1].tokens_per_s, ",.0f", reports),
    ]


def _curve(name: str, values: list[float], last: float, form: str, reports: list[StepReport]) -> Text:
    span = f"steps {reports[0].step} to {reports[-1].step}"
    return Text.assemble(f"{name:<9}", (spark(values), "cyan"), (f" {last:{form}}", "bold"), f"  {span}", style="")


def _newest_events(path: Path) -> deque[Event]:
    return deque(read_events(path) if path.is_file() else (), maxlen=_EVENTS)


def _event_line(event: Event) -> Text:
    at = time.strftime("%H:%M:%S", time.localtime(event.time_s))
    first_line = event.text.splitlines()[0] if event.text else ""
    return Text.assemble(
        (f"{at} ", "dim"), (f"{event.kind:<12} ", "bold"), first_line, no_wrap=True, overflow="ellipsis"
    )
