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

    @property
    def ratio(self) -> float | None:
        """Ours over the peer's."""
        return self.value / self.peer_value if self.peer_value else None


def median_row(
    what: str, values: Sequence[float], unit: str, *, peer: str | None = None, peer_values: Sequence[float] = ()
) -> Row:
    """The median and interquartile range of repeated measurements, and the peer's median."""
    spread = None
    if len(values) > 1:
        first, _, third = statistics.quantiles(values, n=4)
        spread = third - first
    peer_value = statistics.median(peer_values) if peer_values else None
    return Row(what, statistics.median(values), unit, spread, peer=peer, peer_value=peer_value)


def publish(name: str, rows: Sequence[Row], seconds: float) -> None:
    """Print the table and write ``build/bench/NAME.json``."""
    table = Table(
        title=f"{name} ({seconds:.0f} s on {platform.machine()}, {platform.python_version()})", title_justify="left"
    )
    for column in ("what", "value", "unit", "spread", "goal", "peer", "peer value", "ratio"):
        table.add_column(column, justify="left" if column in ("what", "unit", "peer") else "right")
    for row in rows:
        numbers = (row.spread, row.goal, row.peer_value, row.ratio)
        spread, goal, peer_value, ratio = ("" if number is None else f"{number:,.4g}" for number in numbers)
        table.add_row(row.what, f"{row.value:,.4g}", row.unit, spread, goal, row.peer or "", peer_value, ratio)
    Console(width=180).print(table)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    document = {"name": name, "seconds": seconds, "rows": [asdict(row) | {"ratio": row.ratio} for row in rows]}
    (OUTPUT / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
