"""The loss of a run over its steps, as PNG and as text, with what happened on the way. Plot libraries load when used."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evermesh.fault.events import Event
from evermesh.runtime.telemetry import StepReport

_COLOURS = {
    "saved": "#3b8f5a",
    "resumed": "#b5651d",
    "moved": "#b5651d",
    "skipped": "#c0392b",
    "stopped": "#6b6b6b",
    "failed": "#c0392b",
}
_WORDS = {
    "checkpoint": "saved",
    "resumed": "resumed",
    "layout moved": "moved",
    "skipped": "skipped",
    "stopped": "stopped",
    "failed": "failed",
}
_MAX_SAVED_LABELS = 10
"""With more checkpoints than this, they are marked but not labelled."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at a step, besides the step."""

    step: int
    words: tuple[str, ...]
    """Among saved, stopped, failed, resumed, moved, skipped; in the order they happened."""
    note: str = ""

    @property
    def text(self) -> str:
        """The label."""
        return f"{' · '.join(self.words)}{self.note}"

    @property
    def colour(self) -> str:
        """Of the rarest of its words."""
        return _COLOURS[min(self.words, key=["failed", "resumed", "moved", "skipped", "stopped", "saved"].index)]


def marks(events: Iterable[Event], reports: Sequence[StepReport]) -> list[Mark]:
    """What to mark in a plot, one per step: checkpoints, stops, resumes, moves to other layouts and skipped steps."""
    words: dict[int, list[str]] = {}
    for event in events:
        if event.step is not None and event.kind in _WORDS and _WORDS[event.kind] not in words.get(event.step, []):
            words.setdefault(event.step, []).append(_WORDS[event.kind])
    workers = {report.step: report.workers for report in reports}
    return [
        Mark(
            step, tuple(found), f" on {workers[step + 1]} workers" if "resumed" in found and step + 1 in workers else ""
        )
        for step, found in sorted(words.items())
    ]


def loss_png(
    reports: Sequence[StepReport], found: Sequence[Mark], path: Path, *, title: str, vocabulary: int | None = None
) -> None:
    """Write the loss over the steps as a picture; ``found`` is marked with labels that do not overlap."""
    loss_figure(reports, found, title=title, vocabulary=vocabulary).savefig(path, format="png")


def loss_figure(
    reports: Sequence[StepReport], found: Sequence[Mark], *, title: str, vocabulary: int | None = None
) -> Any:
    """The same as a figure of matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    _draw_loss(axes, reports)
    if vocabulary:
        _draw_guess(axes, vocabulary)
    rows = _draw_marks(axes, found)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=10 + 14 * rows)
    return figure


def _draw_loss(axes: Any, reports: Sequence[StepReport]) -> None:
    steps, losses = [report.step for report in reports], [report.loss for report in reports]
    marker = "o" if len(steps) <= 100 else None
    axes.plot(steps, losses, color="#2456a6", linewidth=1.8, marker=marker, markersize=3.5, zorder=3)
    evaluated = [(report.step, report.held_out_loss) for report in reports if report.held_out_loss is not None]
    if evaluated:
        style: dict[str, Any] = {"color": "#c2571a", "linewidth": 1.4, "marker": "s", "markersize": 4, "zorder": 3}
        axes.plot(*zip(*evaluated, strict=True), **style, label="held out")
        axes.legend(frameon=False, fontsize=8.5)
    axes.set_xlabel("step")
    axes.set_ylabel("mean loss per token, nats")
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(min(steps) - 0.5, max(steps) + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_guess(axes: Any, vocabulary: int) -> None:
    guess = math.log(vocabulary)
    axes.axhline(guess, color="#999999", linestyle=(0, (5, 4)), linewidth=1.1, zorder=1)
    label = f"uniform guess, ln {vocabulary:,} = {guess:.2f}"
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "zorder": 4}
    place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # marks must not cross the words
    axes.annotate(label, (1, guess), **place, xytext=(-2, -4), ha="right", va="top", fontsize=8.5, color="#777777")


def _draw_marks(axes: Any, found: Sequence[Mark]) -> int:
    """Draw the marks; returns the number of rows of labels above the axes."""
    ends: list[float] = []  # where the last label of every row ends, in pixels
    only_saved = sum(mark.words == ("saved",) for mark in found)
    for mark in found:
        axes.axvline(mark.step, color=mark.colour, linewidth=1.1, linestyle=":", zorder=2)
        if mark.words == ("saved",) and only_saved > _MAX_SAVED_LABELS:
            continue
        label = _label(axes, mark)
        box = label.get_window_extent()
        row = next((row for row, end in enumerate(ends) if box.x0 > end + 6), len(ends))
        ends[row:] = [box.x1, *ends[row + 1 :]]
        label.set_position((0, 4 + 14 * row))
    return len(ends)


def _label(axes: Any, mark: Mark) -> Any:
    return axes.annotate(
        mark.text, (mark.step, 1.0), xycoords=("data", "axes fraction"), textcoords="offset points",
        xytext=(0, 4), ha="center", va="bottom", fontsize=8.5, color=mark.colour,
    )  # fmt: skip


def loss_text(reports: Sequence[StepReport], found: Sequence[Mark], *, width: int = 80, height: int = 16) -> str:
    """The loss over the steps for a terminal, without colours; resumes are vertical lines."""
    import plotext

    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(min(width, 120), height)
    figure.title("loss (nats per token) over steps")
    steps = [report.step for report in reports]
    figure.draw(figure.signal(steps, [report.loss for report in reports], marker="braille").lines())
    ticks = _whole_ticks(steps[0], steps[-1])
    figure.ruler("x").ticks(ticks, [str(step) for step in ticks])
    resumes = [mark for mark in found if "resumed" in mark.words]
    for mark in resumes:
        figure.line(mark.step, "vertical", style="dotted")
    notes = [f"    ┊ step {mark.step}: {mark.text}" for mark in resumes]
    return "\n".join([_without_colours(figure.build().string()), *notes])


def _whole_ticks(first: int, last: int) -> list[int]:
    every = max(1, -(-(last - first) // 6))
    return [*range(first, last - every // 2, every), last]


def _without_colours(text: str) -> str:
    from rich.text import Text

    return "\n".join(Text.from_ansi(line).plain.rstrip() for line in text.splitlines())
