"""What is seen of a run while it trains: one live line on a terminal, plain lines anywhere else."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from evermesh.runtime.telemetry import StepReport

_BAR_WIDTH = 16
_PLAIN_EVERY_S = 1.0
"""Least time between two plain lines, so that fast steps do not flood a log."""


class Progress:
    """Shows reports as they come, from inside its ``with`` block."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: StepReport | None = None
        self._shown: int | None = None
        self._shown_s = float("-inf")
        self._live = Live(Spinner("dots", "starting workers"), console=console, refresh_per_second=8)

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            if self._last is None:
                self._live.update("")
            self._live.stop()
        elif self._last and self._shown != self._last.step:
            self._print(self._last)

    def show(self, report: StepReport) -> None:
        """Show the step that has just ended."""
        self._last = report
        if self._console.is_terminal:
            self._live.update(live_line(report))
        elif time.monotonic() - self._shown_s >= _PLAIN_EVERY_S:
            self._print(report)

    def say(self, text: str) -> None:
        """Print a line above the progress."""
        self._console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)

    def _print(self, report: StepReport) -> None:
        self._shown, self._shown_s = report.step, time.monotonic()
        self._console.print(plain_line(report), soft_wrap=True, highlight=False, markup=False)


def plain_line(report: StepReport) -> str:
    """One step in one line of text."""
    skipped = "" if report.committed else " | skipped"
    return (
        f"step {report.step:>{len(str(report.steps))}}/{report.steps} | loss {report.loss:.4f}{_held_out(report)} | "
        f"{report.tokens_per_s:,.0f} tokens/s | {report.plan} | {duration(report.time_left_s)} left{skipped}"
    )


def live_line(report: StepReport) -> Text:
    """One step as a bar and numbers; what does not fit into the terminal is cut off at the end."""
    done = round(_BAR_WIDTH * report.step / report.steps)
    skipped = ("", "") if report.committed else (" | skipped", "red")
    line = Text.assemble(
        f"step {report.step}/{report.steps} ",
        ("━" * done, "green"),
        ("━" * (_BAR_WIDTH - done), "bright_black"),
        (f" loss {report.loss:.4f}{_held_out(report)}", "bold"),
        f" | {report.tokens_per_s:,.0f} tokens/s | {duration(report.time_left_s)} left | {report.plan}",
        skipped,
    )
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _held_out(report: StepReport) -> str:
    return "" if report.held_out_loss is None else f" | held out {report.held_out_loss:.4f}"


def duration(seconds: float) -> str:
    """``1:05`` or ``2:03:09``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
