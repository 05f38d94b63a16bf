"""What a benchmark returns, how it is printed, and where it is written."""

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

OUTPUT = Path("build/bench")


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure, next to a peer measured in the same run where there is one."""

    what: str
    value: float
    unit: str
    spread: float | None = None
    """Interquartile range of ``value``; None for a single or exact figure."""
    goal: float | None = None
    peer: str | None = None
    peer_value: float | None = None
    ratio: float | None = None
    """Ours over the peer's."""
    ratio_spread: float | None = None
    """Interquartile range of ``ratio``."""


def exact_row(
    what: str,
    value: float,
    unit: str,
    *,
    goal: float | None = None,
    peer: str | None = None,
    peer_value: float | None = None,
) -> Row:
    """A figure without spread, and its ratio to the peer's."""
    ratio = value / peer_value if peer_value else None
    return Row(what, value, unit, goal=goal, peer=peer, peer_value=peer_value, ratio=ratio)


def paired_row(what: str, values: Sequence[float], unit: str, *, peer: str, peer_values: Sequence[float]) -> Row:
    """Medians of rounds in which we and the peer did the same work, and the median ratio of the pairs."""
    ratios = [ours / theirs for ours, theirs in zip(values, peer_values, strict=True)]
    return Row(
        what,
        statistics.median(values),
        unit,
        _interquartile_range(values),
        peer=peer,
        peer_value=statistics.median(peer_values),
        ratio=statistics.median(ratios),
        ratio_spread=_interquartile_range(ratios),
    )


def _interquartile_range(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    first, _, third = statistics.quantiles(values, n=4)
    return third - first


def publish(name: str, rows: Sequence[Row], seconds: float) -> None:
    """Print the table and write ``build/bench/NAME.json``."""
    table = Table(
        title=f"{name} ({seconds:.0f} s on {platform.machine()}, {platform.python_version()})", title_justify="left"
    )
    for column in ("what", "value", "unit", "spread", "goal", "peer", "peer value", "ratio", "spread of it"):
        table.add_column(column, justify="left" if column in ("what", "unit", "peer") else "right")
    for row in rows:
        numbers = (row.spread, row.goal, row.peer_value, row.ratio, row.ratio_spread)
        spread, goal, peer_value, ratio, ratio_spread = (
            "" if number is None else f"{number:,.4g}" for number in numbers
        )
        table.add_row(
            row.what, f"{row.value:,.4g}", row.unit, spread, goal, row.peer or "", peer_value, ratio, ratio_spread
        )
    Console(width=180).print(table)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    document = {"name": name, "seconds": seconds, "rows": [asdict(row) for row in rows]}
    (OUTPUT / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
