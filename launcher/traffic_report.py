"""What a plan of paths says: tables and sentences, JSON, and the files that bring it about."""

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from evermesh.launcher.traffic_plan import Busiest, TrafficPlan
from evermesh.parallelism.fabric.paths import Loads, Paths
from evermesh.parallelism.fabric.settings import env_text, environments, hostfile
from evermesh.parallelism.layout.explain import degrees_of

_BUSIEST = 5
_FORMAT = "evermesh-paths-1"


def headline(found: TrafficPlan) -> str:
    """The job and its network, in one line."""
    wiring = found.wiring
    return (
        f"[bold]{found.job}[/]: {degrees_of(found.layout)} on {_count(len(wiring.nodes), 'node')} with {len(wiring.cards):,} "
        f"{wiring.nic_class} cards, {len(wiring.leaves):,} leaves and {_count(len(wiring.spines), 'spine')}; "
        f"{_size(found.flows.total_bytes)} leave nodes in a step, in {len(found.assignment.paths):,} streams"
    )


def loads_table(found: TrafficPlan) -> Table:
    """Seconds that the busiest link of each kind needs in a step, by hash and by plan."""
    names = ["hash, median", "hash, best to worst", "plan"]
    names += ["moving little"] if found.replanned is not None else []
    table = _table("seconds of a step on the busiest link", *names, "lower bound")
    plans = [found.assignment, *([found.replanned.assignment] if found.replanned is not None else [])]
    bound = found.assignment.bound
    kinds: dict[str, Callable[[Busiest], float]] = {
        "of all": lambda one: one.most,
        "of ports": lambda one: one.ports,
        "between leaves and spines": lambda one: one.trunks,
    }
    for name, of in kinds.items():
        hashes = [of(one) for one in found.hashed]
        figures = [_seconds(statistics.median(hashes)), f"{_seconds(min(hashes))} to {_seconds(max(hashes))}"]
        figures += [_seconds(of(Busiest.of(one.loads))) for one in plans]
        table.add_row(name, *figures, f"{_seconds(bound.seconds)}, {bound.binding}" if name == "of all" else "")
    return table


def rails_table(found: TrafficPlan) -> Table:
    """Which groups leave what."""
    table = _table("bytes of a step that leave", "nodes", "rails", "leaves", "racks")
    for row in found.rails:
        sizes = (row.node_bytes, row.rail_bytes, row.leaf_bytes, row.rack_bytes)
        table.add_row(f"{row.label.axis} {row.label.call_site} ({row.label.operation})", *map(_size, sizes))
    return table


def parts_lines(found: TrafficPlan) -> Iterator[str]:
    """What brings each part of the plan about."""
    for part in found.parts:
        yield f"{part.how}: {part.part}. {part.by[0].upper()}{part.by[1:]}."


def lines_of(found: TrafficPlan) -> Iterator[str]:
    """In sentences: order, gain, what is broken, the busiest links."""
    order, plan = found.order, found.assignment
    if not len(plan.paths):
        yield "Nothing leaves a node: there are no paths to plan."
        return
    if list(order.nodes) != sorted(order.nodes):
        yield (
            f"Order: {_size(order.crossing_bytes)} of a step between nodes that share no leaf, {_size(order.given_bytes)} as "
            "given; the nodes by rank are in the hostfile and in --json."
        )
    word = (
        "the least there can be" if plan.is_optimal else f"at most {plan.loads.most / plan.bound.seconds - 1:.1%} above"
    )
    yield f"Plan: {found.gain:.2f} times less on the busiest link than a hash (median of {len(found.hashed)}), {word}."
    if found.replanned is not None:
        yield (
            f"Broken: {', '.join(found.asked.failed)}: {found.replanned.cut} streams cut, {found.replanned.moved} others "
            f"moved to make room; {_seconds(found.replanned.assignment.loads.most)} s, planned from scratch "
            f"{_seconds(plan.loads.most)} s."
        )
    busiest = ", ".join(f"{link} {_seconds(seconds)} s" for link, seconds in busiest_links(found))
    if busiest:
        yield f"Busiest links: {busiest}."
    yield (
        f"A step takes {_seconds(found.step_s)} s{'' if found.asked.step_s else ' by formula'}; the busiest link is in use "
        f"{plan.loads.most / found.step_s:.1%} of it."
    )


def busiest_links(found: TrafficPlan) -> list[tuple[str, float]]:
    """By name, seconds; the largest first."""
    named = found.assignment.loads.named(found.wiring)
    return sorted(named.items(), key=lambda item: (-item[1], item[0]))[:_BUSIEST]


def as_json(found: TrafficPlan) -> str:
    """All figures; loads in seconds of a step, sizes in bytes of a step."""
    plan, again = found.assignment, found.replanned
    document: dict[str, Any] = {
        "job": found.job,
        "nodes": [node.name for node in found.wiring.nodes],
        "bytes_between_leaves": {"given": found.order.given_bytes, "order": found.order.crossing_bytes},
        "bytes_leaving_nodes": found.flows.total_bytes,
        "streams": len(plan.paths),
        "step_s": found.step_s,
        "hash_s": [one.most for one in found.hashed],
        "plan_s": plan.loads.most,
        "bound_s": plan.bound.seconds,
        "binding": plan.bound.binding,
        "is_optimal": plan.is_optimal,
        "links_s": plan.loads.named(found.wiring),
        "failed": list(found.asked.failed),
        "replanned": None
        if again is None
        else {"cut": again.cut, "moved": again.moved, "plan_s": again.assignment.loads.most},
        "rails": [
            {**row.label._asdict(), **{k: v for k, v in asdict(row).items() if k != "label"}} for row in found.rails
        ],
        "parts": [asdict(part) for part in found.parts],
    }
    return json.dumps(document, indent=1)


def write_settings(found: TrafficPlan, directory: Path) -> list[str]:
    """Write ``hostfile``, ``paths.json`` and an environment for every node, or one for all; names of the files."""
    directory.mkdir(parents=True, exist_ok=True)
    variables = environments(found.wiring, parts=found.asked.parts, pxn=found.asked.pxn)
    texts = {name: env_text(of_node) for name, of_node in variables.items()}
    files = {"hostfile": hostfile(found.wiring), "paths.json": _paths(found)}
    if len(set(texts.values())) == 1:
        files["all.env"] = next(iter(texts.values()))
    else:
        files |= {f"{name}.env": text for name, text in texts.items()}
    for name, text in files.items():
        (directory / name).write_text(text)
    return sorted(files)


def _paths(found: TrafficPlan) -> str:
    """Every stream with its path, for a network plugin."""
    wiring, paths = found.wiring, found.assignment.paths
    names, of_connection = wiring.port_names(), found.connections
    streams = []
    for at, (source, target, spine) in enumerate(_ends(paths)):
        axis = of_connection.axes[int(of_connection.axis[paths.connection[at]])]
        via = wiring.spines[spine] if spine >= 0 else None
        streams.append([axis, names[source], names[target], via, round(float(paths.num_bytes[at]))])
    columns = ["axis", "from port", "to port", "spine", "bytes"]
    rows = ",\n".join(json.dumps(stream) for stream in streams)
    return f'{{"format": "{_FORMAT}", "columns": {json.dumps(columns)}, "streams": [\n{rows}\n]}}\n'


def _ends(paths: Paths) -> Iterator[tuple[int, int, int]]:
    columns = (paths.source_port.tolist(), paths.target_port.tolist(), paths.spine.tolist())
    yield from zip(*columns, strict=True)


def own_loads(found: TrafficPlan) -> Loads:
    """Bytes of the job alone in a step."""
    return Loads.of(found.assignment.paths, found.wiring)


def _table(first: str, *columns: str) -> Table:
    table = Table(first, *columns, box=None, header_style="bold", pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _seconds(value: float) -> str:
    return f"{value:.4g}"


def _size(num_bytes: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.4g} {unit}"
    return f"{num_bytes:,.0f} B" if num_bytes else "-"


__all__ = [
    "as_json",
    "busiest_links",
    "headline",
    "lines_of",
    "loads_table",
    "own_loads",
    "parts_lines",
    "rails_table",
    "write_settings",
]
