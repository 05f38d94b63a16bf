"""What the rings of a job say, as tables or JSON."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from evermesh.fault.recorder.area import KEPT, RingFile, rings_of
from evermesh.fault.recorder.errors import RingUnreadable
from evermesh.fault.recorder.reader import RingState, process_of, read_ring
from evermesh.fault.recorder.record import DTYPES, NO_PEER, OPERATIONS, PHASES, Flags
from evermesh.fault.recorder.trace import RankTrace
from evermesh.launcher.errors import RunNotFound
from evermesh.launcher.finding import FoundJob, find_job
from evermesh.launcher.terminal import print_table


@dataclass(frozen=True, slots=True)
class RankRecords:
    """One ring, read."""

    trace: RankTrace
    state: RingState
    process: str
    """``runs``, ``is stopped``, ``is held`` (by a debugger) or ``is gone``."""


def find_recorded(name: str | None, runs: Path) -> FoundJob:
    """As ``find_job``, and the folder of the logs of a script that has ended.

    Raises:
        JobAmbiguous, RunNotFound: see there.
    """
    if name is not None and (Path(name) / KEPT).is_dir():
        return FoundJob(Path(name).absolute().name, Path(name).absolute(), None, None)
    return find_job(name, runs)


def show_records(job: FoundJob, *, ranks: Sequence[int] | None, last: int, as_json: bool) -> None:
    """Print the last records of every rank.

    Raises:
        RunNotFound: there are none; says why.
    """
    wanted = [ring for ring in rings_of(job.directory) if ranks is None or ring.rank in ranks]
    found = list(_read(wanted))
    if not found:
        raise RunNotFound(
            f"{job.name} has no records{f' of rank {ranks}' if ranks else ''}: none of its ranks has made a process group "
            f"yet, recording is off (record: off), or they are in the memory of another machine, which writes them to "
            f"{job.directory / 'records'} when its ranks end."
        )
    if as_json:
        print(json.dumps([_as_dict(one, last) for one in found], indent=1))
        return
    for one in found:
        print_table(_table(one, last))


def _read(rings: Sequence[RingFile]) -> Iterator[RankRecords]:
    for ring in rings:
        try:
            trace, state = read_ring(ring.path)
        except (RingUnreadable, OSError) as error:  # it is being made, or was removed meanwhile
            print(f"rank {ring.rank}: {error}", file=sys.stderr)
            continue
        yield RankRecords(trace, state, _process(trace, state))


def _process(trace: RankTrace, state: RingState) -> str:
    found = process_of(trace, state)
    if found is None:
        return "is gone"
    return "is stopped" if found.is_stopped else "is held" if found.is_held else "runs"


def _table(one: RankRecords, last: int) -> Table:
    trace, state = one.trace, one.state
    title = (
        f"rank {trace.rank} of {state.world_size} on {trace.node}, process {trace.pid} {one.process}: step {trace.step}, "
        f"{trace.phase}; {_total(trace):,} records by the {state.tier} tap"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("#", "operation", "group", "n", "bytes", "dtype", "step", "phase", "site", "began", "took"):
        table.add_column(column, justify="right" if column in ("#", "n", "bytes", "step", "began", "took") else "left")
    for record in trace.records[-last:]:
        row = _record(trace, state, record, is_alive=one.process != "is gone")
        peer = "" if row["peer"] is None else f" {'to' if row['operation'] == 'send' else 'of'} {row['peer']}"
        began = "" if row["began_s_ago"] is None else f"{_duration(row['began_s_ago'])} ago"
        numbers = f"{row['number']}", f"{row['num_bytes']:,}"
        cells = (f"{row['sequence']}", f"{row['operation']}{peer}", _group(row), *numbers, row["dtype"])
        table.add_row(*cells, f"{row['step']}", row["phase"], row["site"], began, _took(row))
    return table


def _record(trace: RankTrace, state: RingState, record: Any, *, is_alive: bool) -> dict[str, Any]:
    """One record in words; times in seconds."""
    entered, enqueued, ended = (int(record[name]) for name in ("entered_ns", "enqueued_ns", "ended_ns"))
    flags, group = Flags(int(record["flags"])), trace.groups.get(int(record["group"]))
    return {
        "sequence": int(record["sequence"]),
        "operation": OPERATIONS[record["operation"]],
        "peer": None if record["peer"] == NO_PEER else int(record["peer"]),
        "group": group.to_dict() if group else None,
        "number": int(record["number"]),
        "num_bytes": int(record["num_bytes"]),
        "dtype": DTYPES[record["dtype"]],
        "step": int(record["step"]),
        "phase": PHASES[record["phase"]],
        "site": trace.sites.get(int(record["site"]), ""),
        "began_s": (entered + trace.wall_offset_ns) / 1e9,
        "began_s_ago": (trace.read_ns - entered) / 1e9 if state.is_of_this_boot else None,
        "enqueued_s": (enqueued - entered) / 1e9 if enqueued else None,
        "took_s": (ended - entered) / 1e9 if ended else None,
        "is_open": not ended and bool(flags & Flags.END_SEEN or not enqueued),
        "is_alive": is_alive,
        "failed": Flags.FAILED in flags,
        "blocks": Flags.BLOCKING in flags,
        "is_device_time": Flags.DEVICE_TIMES in flags,
    }


def _took(row: dict[str, Any]) -> str:
    if row["failed"]:
        return f"failed after {_duration(row['took_s'])}"
    if row["took_s"] is not None:
        return _duration(row["took_s"])
    if not row["is_open"]:
        return "not seen"
    return "runs" if row["is_alive"] else "never ended"


def _group(row: dict[str, Any]) -> str:
    group = row["group"]
    if group is None:
        return "?"
    ranks = group["ranks"]
    members = ",".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]}..{ranks[-1]} ({len(ranks)})"
    return f"{group['axis'] or group['name']} [{members}]".replace("[", "\\[")


def _duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _total(trace: RankTrace) -> int:
    return int(trace.records["sequence"][-1]) if len(trace.records) else 0


def _as_dict(one: RankRecords, last: int) -> dict[str, Any]:
    trace, state, is_alive = one.trace, one.state, one.process != "is gone"
    return {
        "rank": trace.rank,
        "world_size": state.world_size,
        "node": trace.node,
        "pid": trace.pid,
        "process": one.process,
        "generation": state.generation,
        "tap": state.tier,
        "step": trace.step,
        "phase": trace.phase,
        "num_records": _total(trace),
        "heartbeat_s_ago": (trace.read_ns - state.beat_ns) / 1e9 if state.beat_ns and state.is_of_this_boot else None,
        "groups": [{**group.to_dict(), **_progress(state, index)} for index, group in sorted(trace.groups.items())],
        "records": [_record(trace, state, record, is_alive=is_alive) for record in trace.records[-last:]],
    }


def _progress(state: RingState, index: int) -> dict[str, int]:
    """By torch's own counters."""
    found = state.groups.get(index)
    return {"begun": found.begun, "over": found.over} if found else {}
