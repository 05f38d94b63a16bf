"""The report of a run with faults as it is printed."""

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from evermesh.launcher.chaos.report import ChaosReport, FaultReport


def fault_table(report: ChaosReport) -> Table:
    """A line per fault."""
    table = Table(
        "fault",
        "found after",
        "answered after",
        "as",
        "training after",
        "steps lost",
        "outcome",
        box=None,
        header_style="bold",
        pad_edge=False,
    )
    for fault in report.faults:
        table.add_row(*_cells(fault))
    return table


def lines(report: ChaosReport) -> Iterator[str]:
    """The run as a whole."""
    yield f"{report.steps} steps in {report.attempts} attempts, {report.steps_lost} steps trained again"
    yield f"goodput {report.goodput:.1%} of {report.wall_s:.1f} s"
    yield f"left behind: {', '.join((*report.orphans, *report.leaked_memory)) or 'nothing'}"
    if report.parameters is not None:
        yield f"parameters {report.parameters}"
    if report.comparison is not None:
        found = report.comparison
        yield f"{found.verdict} to a run without faults, {found.slowdown:.2f} times as long"
    yield report.run


def _cells(fault: FaultReport) -> tuple[str, ...]:
    return (
        escape(fault.injected or fault.fault),
        _seconds(fault.found_after_s),
        _seconds(fault.detected_after_s),
        escape(fault.cause or ""),
        _seconds(fault.training_after_s),
        str(fault.steps_lost) if fault.outcome == "restarted" else "",
        fault.outcome,
    )


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"
