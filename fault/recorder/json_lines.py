"""Records as JSON lines: for other programs, for people, and as what ``evermesh diagnose`` reads.

Every line is an object with a ``type``:

- ``group``: ``id`` (a number that this file calls it by), ``name``, ``ranks`` (global), ``axis``;
- ``rank``: ``rank``, ``node``, ``pid``, ``step``, ``phase``, ``read_ns``, ``wall_offset_ns``, ``groups`` (ids of those that
  it is in). Records up to the next such line are its own;
- ``record``: the fields of RECORD, with ``group`` as an id, ``operation``, ``dtype`` and ``phase`` by name, ``site`` as text,
  ``peer`` null where there is none, ``flags`` as a list of names in lower case.

May be left out: ``axis``, ``pid``, ``phase`` (train), ``wall_offset_ns``; of records ``sequence`` (the next one),
``enqueued_ns``, ``dtype``, ``site``, ``peer``, ``phase`` (train) and ``flags`` (``end_seen`` with ``blocking``).
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np

from evermesh.fault.errors import RecordsUnreadable
from evermesh.fault.recorder.record import DTYPES, NO_PEER, OPERATIONS, PHASES, RECORD, Flags, Group
from evermesh.fault.recorder.trace import RankTrace
from evermesh.parallelism.collectives import Phase

_MOST_GROUPS = 65_536
_OPERATIONS = {name: index for index, name in enumerate(OPERATIONS)}
_DTYPES = {name: index for index, name in enumerate(DTYPES)}
_PHASES = {name: index for index, name in enumerate(PHASES)}
_FLAGS = {str(flag.name).lower(): flag for flag in Flags}
_USUAL = ["end_seen", "blocking"]


def write_json_lines(traces: Sequence[RankTrace]) -> Iterator[str]:
    """The lines of some ranks, each with its end."""
    ids: dict[tuple[str, tuple[int, ...]], int] = {}
    for trace in traces:
        for group in trace.groups.values():
            key = (group.name, group.ranks)
            if key not in ids:
                ids[key] = len(ids)
                yield _line({"type": "group", "id": ids[key], **group.to_dict()})
    for trace in traces:
        own = {local: ids[group.name, group.ranks] for local, group in trace.groups.items()}
        header = {
            name: getattr(trace, name) for name in ("rank", "node", "pid", "step", "phase", "read_ns", "wall_offset_ns")
        }
        yield _line({"type": "rank", **header, "groups": sorted(own.values())})
        for record in trace.records:
            yield _line({"type": "record", **_record(record, own, trace.sites)})


def _record(record: np.void, groups: Mapping[int, int], sites: Mapping[int, str]) -> dict[str, Any]:
    numbers = ("sequence", "entered_ns", "enqueued_ns", "ended_ns", "num_bytes", "number", "step")
    return {
        **{name: int(record[name]) for name in numbers},
        "group": groups.get(int(record["group"])),
        "site": sites.get(int(record["site"]), ""),
        "peer": int(record["peer"]) if record["peer"] != NO_PEER else None,
        "operation": OPERATIONS[record["operation"]],
        "dtype": DTYPES[record["dtype"]],
        "phase": PHASES[record["phase"]],
        "flags": [name for name, flag in _FLAGS.items() if int(record["flags"]) & flag],
    }


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":")) + "\n"


@dataclass(slots=True)
class _Rank:
    header: dict[str, Any]
    local: dict[int, int]
    rows: list[tuple[int, ...]] = field(default_factory=list)
    sites: dict[str, int] = field(default_factory=lambda: {"": 0})


def read_json_lines(lines: Iterable[str | bytes], name: str) -> list[RankTrace]:
    """The ranks that the lines of ``name`` describe.

    Raises:
        RecordsUnreadable: a line is not what the format says; names it.
    """
    groups: dict[int, Group] = {}
    ranks: list[_Rank] = []
    number = 0
    try:
        for line in lines:
            number += 1
            if not line.strip():
                continue
            value = json.loads(line)
            kind = value.pop("type")
            if kind == "group":
                if len(groups) >= _MOST_GROUPS:
                    raise ValueError(f"more than {_MOST_GROUPS:,} groups")
                members = tuple(int(rank) for rank in value["ranks"])
                groups[int(value["id"])] = Group(str(value["name"]), members, str(value.get("axis", "")))
            elif kind == "rank":
                ranks.append(_Rank(_checked(value), {int(group): local for local, group in enumerate(value["groups"])}))
            elif kind == "record":
                if not ranks:
                    raise ValueError("a record comes before the first line of type rank")
                ranks[-1].rows.append(_row(value, ranks[-1]))
            else:
                raise ValueError(f"unknown type {kind!r}")
        return [_trace(rank, groups) for rank in ranks]
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        fact = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise RecordsUnreadable(f"{name}, line {number}", fact) from error


def _checked(header: dict[str, Any]) -> dict[str, Any]:
    phase = header.get("phase", "train")
    if phase not in get_args(Phase):
        raise ValueError(f"unknown phase {phase!r}")
    numbers = {field: int(header[field]) for field in ("rank", "step", "read_ns")}
    optional = {field: int(header.get(field, 0)) for field in ("pid", "wall_offset_ns")}
    return {**numbers, **optional, "phase": phase, "node": str(header["node"])}


def _row(value: dict[str, Any], rank: _Rank) -> tuple[int, ...]:
    site = rank.sites.setdefault(str(value.get("site", "")), len(rank.sites))
    peer = value.get("peer")
    flags = sum(_FLAGS[name] for name in value.get("flags", _USUAL))
    previous = rank.rows[-1][0] if rank.rows else 0
    return (
        int(value.get("sequence", previous + 1)),
        int(value["entered_ns"]),
        int(value.get("enqueued_ns", 0)),
        int(value["ended_ns"] or 0),
        int(value["num_bytes"]),
        rank.local[int(value["group"])],
        int(value["number"]),
        int(value["step"]),
        site,
        NO_PEER if peer is None else int(peer),
        _OPERATIONS[value["operation"]],
        _DTYPES[value.get("dtype", "none")],
        _PHASES[value.get("phase", "train")],
        flags,
    )


def _trace(rank: _Rank, groups: Mapping[int, Group]) -> RankTrace:
    header = rank.header
    return RankTrace(
        rank=header["rank"],
        node=header["node"],
        pid=header["pid"],
        records=np.array(rank.rows, RECORD),
        groups={local: groups[group] for group, local in rank.local.items()},
        sites={index: site for site, index in rank.sites.items()},
        step=header["step"],
        phase=header["phase"],
        read_ns=header["read_ns"],
        wall_offset_ns=header["wall_offset_ns"],
    )
