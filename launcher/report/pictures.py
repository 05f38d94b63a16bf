"""The pictures of a report, as SVG that stands inside of a page."""

import io
import re
from collections.abc import Sequence
from typing import Any

from evermesh.launcher.plots import loss_figure, marks
from evermesh.launcher.report.accounting import Span, Step
from evermesh.launcher.report.gathering import Material

_COLOURS = {
    "placing": "#c9c9c9",
    "starting": "#e3b04b",
    "training": "#3b8f5a",
    "regrouping": "#b5651d",
    "stopping": "#6b6b6b",
    "recovering": "#c0392b",
    "waiting": "#8e6bb0",
}
_MOST_POINTS = 2000


def loss_svg(material: Material) -> str | None:
    """The loss over the steps that count, with what happened on the way; None before the first step."""
    reports = [step.report for step in material.steps if not step.is_lost]
    if not reports:
        return None
    return _svg(loss_figure(reports, marks(material.events, reports), title="loss"))


def time_svg(material: Material) -> str | None:
    """Throughput over the wall time, above the states of the job; None before the first state."""
    if not material.spans:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    began_s = material.spans[0].begin_s
    unit, unit_s = _unit(material.spans[-1].end_s - began_s)
    _draw_throughput(upper, material.steps, began_s, unit_s)
    _draw_states(lower, material.spans, began_s, unit_s)
    lower.set_xlabel(f"{unit} since the launch")
    return _svg(figure)


def _unit(seconds: float) -> tuple[str, float]:
    if seconds < 600:
        return "seconds", 1.0
    return ("minutes", 60.0) if seconds < 4 * 3600 else ("hours", 3600.0)


def _draw_throughput(axes: Any, steps: Sequence[Step], began_s: float, unit_s: float) -> None:
    every = max(1, len(steps) // _MOST_POINTS)
    for is_lost, colour, label in ((False, "#2456a6", "steps that count"), (True, "#c0392b", "trained again later")):
        chosen = [step.report for step in steps if step.is_lost == is_lost][::every]
        if chosen:
            times = [(report.ended_s - began_s) / unit_s for report in chosen]
            rates = [report.tokens_per_s for report in chosen]
            axes.scatter(times, rates, s=5 if len(steps) > 200 else 20, color=colour, label=label, linewidths=0)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("tokens/s")
    axes.set_title("throughput", loc="left", fontsize=12, fontweight="bold")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if any(step.is_lost for step in steps):
        axes.legend(frameon=False, fontsize=8.5, markerscale=3)


def _draw_states(axes: Any, spans: Sequence[Span], began_s: float, unit_s: float) -> None:
    for state, colour in _COLOURS.items():
        bars = [((span.begin_s - began_s) / unit_s, span.seconds / unit_s) for span in spans if span.state == state]
        if bars:
            axes.broken_barh(bars, (0, 1), facecolors=colour, label=state)
    axes.set_yticks([])
    axes.set_ylim(0, 1)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5, ncols=len(_COLOURS), loc="upper left", bbox_to_anchor=(0, 1.6))


def _svg(figure: Any) -> str:
    """Without the head of a file, and without anything that names a time or a tool."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "evermesh"}):
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
