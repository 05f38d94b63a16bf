"""The closing table of a run, from its telemetry and its events."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from evermesh.fault.events import Event, read_events
from evermesh.launcher.progress import duration
from evermesh.launcher.run_directory import Run
from evermesh.runtime.telemetry import StepReport, read_telemetry

_TAIL_BYTES = 1 << 16
_PURPOSES = {
    "ring forward": "rings",
    "ring backward": "rings",
    "ring gradients": "rings",
    "gather forward": "gathered keys",
    "gather backward": "gathered keys",
    "gather gradients": "gathered keys",
    "heads forward": "heads",
    "heads backward": "heads",
}
"""Names of call sites in the summary, where they differ."""


def summary_table(run: Run, *, vocabulary: int | None = None) -> Table:
    """What happened in ``run`` so far, over all its attempts."""
    reports = read_telemetry(run.telemetry) if run.telemetry.is_file() else []
    table = Table(title=f"run {run.name}", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(reports, vocabulary) if reports else [("steps", "none")]:
        table.add_row(name, value)
    for name, value in _event_rows(run):
        table.add_row(name, value)
    return table


def _rows(reports: Sequence[StepReport], vocabulary: int | None) -> list[tuple[str, str]]:
    first, last = reports[0], reports[-1]
    tokens, wall_s = sum(report.num_tokens for report in reports), sum(report.step_s for report in reports)
    guess = f" (uniform guess: ln {vocabulary:,} = {math.log(vocabulary):.4f})" if vocabulary else ""
    skipped = sum(not report.committed for report in reports)
    again = f"{last.num_to_try_again:,} sequences of skipped steps still wait, {last.num_set_aside:,} are set aside"
    return [
        ("steps", f"{last.step} of {last.steps}" + (f", {skipped} skipped" if skipped else "")),
        ("loss", f"{first.loss:.4f} at step {first.step}, {last.loss:.4f} at step {last.step}{guess}"),
        ("tokens", f"{tokens:,} in {sum(report.num_sequences for report in reports):,} sequences"),
        ("speed", f"{tokens / wall_s if wall_s else 0:,.0f} tokens/s over {duration(wall_s)} of steps"),
        ("workers", ", then ".join(str(workers) for workers in _changes(reports))),
        ("sequences", rings_seen(reports)),
        ("micro-batches", micro_batches_seen(reports)),
        ("plans", _plans(reports)),
        *([("tried again", again)] if skipped else []),
        ("traffic", traffic_seen(reports)),
    ]


def _changes(reports: Sequence[StepReport]) -> list[int]:
    found: list[int] = []
    for report in reports:
        if found[-1:] != [report.workers]:
            found.append(report.workers)
    return found


def rings_seen(reports: Sequence[StepReport]) -> str:
    """How many sequences ran on rings of which size."""
    counts: Counter[int] = Counter()
    for report in reports:
        counts.update(report.plan.ring_sizes)
    return ", ".join(f"{counts[size]:,} on {size} rank{'s' if size > 1 else ''}" for size in sorted(counts))


def micro_batches_seen(reports: Sequence[StepReport]) -> str:
    """Least and most micro-batches of a rank, and in how many steps ranks differed."""
    numbers = [number for report in reports for number in report.plan.micro_batches]
    uneven = sum(len(set(report.plan.micro_batches)) > 1 for report in reports)
    return f"{min(numbers)} to {max(numbers)} per rank and step; they differ between ranks in {uneven} steps"


def traffic_seen(reports: Sequence[StepReport]) -> str:
    """Bytes that all ranks together send in a step, on average: for what (parts under 1% are left out), how far."""
    parts = [part for report in reports for part in report.traffic]
    sent: Counter[str] = Counter()
    for part in parts:
        sent[_PURPOSES.get(part.call_site, part.call_site)] += part.wire_bytes
    total = sent.total()
    if not total:
        return "none between ranks"
    steps = sum(bool(report.traffic) for report in reports)
    purposes = [f"{name} {count / steps / 1e6:,.1f} MB" for name, count in sent.most_common() if count >= total / 100]
    within = sum(part.wire_bytes for part in parts if part.tier == "node") / total
    return f"{total / steps / 1e6:,.1f} MB per step: {', '.join(purposes)}; {within:.0%} within nodes"


def _plans(reports: Sequence[StepReport]) -> str:
    ratios = [report.plan.ratio for report in reports]
    fill = sum(report.plan.fill for report in reports) / len(reports)
    return f"makespan/bound {_geomean(ratios):.3f} (worst {max(ratios):.3f}), fill {fill:.0%}"


def _geomean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def _event_rows(run: Run) -> list[tuple[str, str]]:
    events = list(read_events(run.events)) if run.events.is_file() else []
    kinds = Counter(event.kind for event in events)
    resumed = [event for event in events if event.kind == "resumed"]
    from_memory = [event for event in resumed if event.fields.get("source") == "memory"]
    state = run.state()
    rows = [("checkpoints", f"{kinds['checkpoint']} written, {len(resumed) - len(from_memory)} resumed from")]
    if kinds["restarted"]:
        rows.append(("restarts", _restarts(events, from_memory)))
    told = {event.kind: event.text for event in events}  # the newest of each
    rows += [(kind, told[kind]) for kind in ("finding", "not trained") if kind in told]
    if state.started and state.ended:
        took = (state.ended - state.started).total_seconds()
        rows.append(("wall time", f"{duration(took)} in attempt {state.attempt}, start of workers included"))
    return rows


def _restarts(events: Sequence[Event], from_memory: Sequence[Event]) -> str:
    """How many there were, from where, and what they cost."""
    told = [event for event in events if event.kind == "restarted"]
    lost_steps = sum(int(str(event.fields.get("lost_steps", 0))) for event in told)
    text = f"{len(told)}, {lost_steps:,} steps trained again"
    if not from_memory:
        return text
    slowest_s = max(float(str(event.fields["load_s"])) for event in from_memory)
    return f"{text}; {len(from_memory)} from memory, in at most {slowest_s:.2f} s"


def last_report(path: Path) -> StepReport | None:
    """The newest whole report in a telemetry file, without reading all of it."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n") and line.startswith(b"{")]
    return StepReport.from_json(whole[-1]) if whole else None
