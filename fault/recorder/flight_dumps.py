"""Dumps of torch's own flight recorder (format 2.x, of NCCL and of gloo; pickle or JSON) as traces of ranks.

They know less than our rings: entries have no step and, with gloo, no end but ``retired``. Completion as NCCL's
watchdog discovered it is no time either, so ends are left open only where nobody saw one. A pickle is read by a machine
that builds plain values and executes nothing.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evermesh.checkpoint.foreign.pickle_machine import PickleRefused
from evermesh.checkpoint.foreign.pickles import read_pickle
from evermesh.fault.errors import RecordsUnreadable
from evermesh.fault.recorder.record import DTYPES, NO_PEER, OPERATIONS, PHASES, RECORD, Flags, Group
from evermesh.fault.recorder.trace import UNKNOWN_NODE, RankTrace

_NAMES = {
    "allreduce": "all_reduce",
    "all_reduce_barrier": "barrier",
    "allreduce_coalesced": "all_reduce",
    "allgather": "all_gather",
    "_all_gather_base": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "allgather_into_tensor_coalesced": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "_reduce_oop": "reduce",
    "_broadcast_oop": "broadcast",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "recv": "receive_any",
    "recvAnySource": "receive_any",
}
_DTYPES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Float8_e4m3fn": "float8_e4m3fn",
    "Float8_e5m2": "float8_e5m2",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}
_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "complex64": 8,
    "complex128": 16,
}
_PEER = re.compile(r"(send|recv) (\d+)\s*(->|<-)\s*(\d+)")
_RANK = re.compile(r"(\d+)$")
_COLLECTIVES = OPERATIONS.index("send")
_TIMEOUT_S = 1800.0
_WORLD = "default_pg"
_MOST_RANKS = 1 << 20


@dataclass(frozen=True, slots=True)
class Dump:
    """A dump before the groups of all dumps are known."""

    rank: int
    read_ns: int
    config: Mapping[str, tuple[str, tuple[int, ...]]]
    """Name and ranks of groups, by their id; empty with gloo."""
    mentioned: frozenset[str]
    """Ids of groups that the rank is in."""
    entries: Sequence[Mapping[str, Any]]


def rank_of_name(path: Path) -> int | None:
    """The number at the end of a file's name, such as ``nccl_trace_rank_3`` or ``trace_3.json``."""
    found = _RANK.search(
        path.name.removesuffix(path.suffix) if path.suffix in (".json", ".pickle", ".pkl") else path.name
    )
    return int(found[1]) if found else None


def parse_dump(payload: bytes, path: Path, written_ns: int) -> Dump:
    """Read a dump. ``written_ns``: wall clock when the file was written, to tell how old open entries are.

    Raises:
        RecordsUnreadable: it is no dump, or damaged, or its name has no rank.
    """
    rank = rank_of_name(path)
    if rank is None:
        raise RecordsUnreadable(str(path), "it is a dump of a flight recorder, and its name does not end in a rank")
    try:
        document = read_pickle(payload, {}) if payload[:1] == b"\x80" else json.loads(payload)
        entries = [entry for entry in document.get("entries", ()) if isinstance(entry, Mapping)]
        entries.sort(key=lambda entry: int(entry.get("record_id", 0)))
        known = {str(key): _group(value) for key, value in (document.get("pg_config") or {}).items()}
        config = {key: group for key, group in known.items() if group[1]}  # gloo has one that is empty
        mentioned = {_id_of(entry) for entry in entries} | {str(key) for key in document.get("pg_status") or {}}
        last_ns = max((int(entry["time_created_ns"]) for entry in entries), default=written_ns)
        longest_ns = int(max((float(entry.get("timeout_ms") or 0) / 1e3 for entry in entries), default=0) * 1e9)
        age_ns = min(max(written_ns - last_ns, 0), longest_ns or int(_TIMEOUT_S * 1e9))
    except PickleRefused as error:
        raise RecordsUnreadable(str(path), str(error)) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RecordsUnreadable(str(path), f"it is no dump of a flight recorder ({error!r})") from error
    return Dump(rank, last_ns + age_ns, config, frozenset(mentioned), entries)


def _group(value: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    ranks = value["ranks"]
    members = json.loads(ranks) if isinstance(ranks, str) else ranks
    description = str(value.get("desc", ""))
    name = description if description not in ("", "undefined") else str(value.get("name", ""))
    return name, tuple(int(rank) for rank in members)


def _id_of(entry: Mapping[str, Any]) -> str:
    return str(entry["process_group"][0])


def traces_of(dumps: Sequence[Dump]) -> list[RankTrace]:
    """The dumps of one job, together: where they do not say who is in a group, those are who mention it.

    Raises:
        RecordsUnreadable: an entry is not what the format says.
    """
    try:
        groups = _groups_of(dumps)
        return [_trace(dump, groups) for dump in dumps]
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise RecordsUnreadable("a dump of a flight recorder", f"an entry is damaged ({error!r})") from error


def _groups_of(dumps: Sequence[Dump]) -> dict[tuple[str, tuple[int, ...] | None], Group]:
    """By id, and by members where the dumps say who they are: ids may be of different groups on different ranks."""
    found: dict[tuple[str, tuple[int, ...] | None], Group] = {}
    mentioned: dict[str, set[int]] = defaultdict(set)
    names: dict[str, str] = {}
    for dump in dumps:
        for key, (name, ranks) in dump.config.items():
            found[key, ranks] = Group(name or key, ranks, name)
        for key in dump.mentioned - set(dump.config):
            mentioned[key].add(dump.rank)
        for entry in dump.entries:
            names.setdefault(_id_of(entry), str(entry["process_group"][1]))
    for key, members in mentioned.items():
        name = names.get(key, "")
        if name == _WORLD:  # ranks whose dumps are missing are members too
            members |= set(range(max(*members, _size_of(dumps, key) - 1) + 1))
        usual = name if name not in ("", "undefined") else key
        found[key, None] = Group(usual, tuple(sorted(members)))
    return found


def _size_of(dumps: Sequence[Dump], key: str) -> int:
    """Members of a group, as far as what they gathered shows it."""
    sizes = [1]
    for dump in dumps:
        for entry in dump.entries:
            if _id_of(entry) == key and str(entry["profiling_name"]).endswith("all_gather"):
                given, gathered = (
                    sum(math.prod(int(length) for length in shape) for shape in entry.get(name) or ())
                    for name in ("input_sizes", "output_sizes")
                )
                sizes.append(gathered // given if given else 1)
    return min(max(sizes), _MOST_RANKS)


def _trace(dump: Dump, groups: Mapping[tuple[str, tuple[int, ...] | None], Group]) -> RankTrace:
    keys = sorted(dump.mentioned)
    own = {
        index: groups[key, dump.config[key][1]] if key in dump.config else groups[key, None]
        for index, key in enumerate(keys)
    }
    local = {key: index for index, key in enumerate(keys)}
    sites: dict[str, int] = {"": 0}
    first = min((int(entry.get("record_id", 0)) for entry in dump.entries), default=0)
    counted: dict[tuple[int, int, int], int] = defaultdict(int)
    rows = [
        _row(entry, index, local[_id_of(entry)], own[local[_id_of(entry)]], sites, counted, first > 0)
        for index, entry in enumerate(dump.entries)
    ]
    return RankTrace(
        rank=dump.rank,
        node=UNKNOWN_NODE,
        pid=0,
        records=np.array(rows, RECORD),
        groups=own,
        sites={index: site for site, index in sites.items()},
        step=0,
        phase="train",
        read_ns=dump.read_ns,
        wall_offset_ns=0,
    )


def _row(
    entry: Mapping[str, Any],
    index: int,
    group: int,
    members: Group,
    sites: dict[str, int],
    counted: dict[tuple[int, int, int], int],
    is_cut: bool,
) -> tuple[int, ...]:
    """``is_cut``: entries before the first have been overwritten, so that messages cannot be numbered."""
    full = str(entry["profiling_name"])
    operation, peer = _operation(full, members)
    number = int(entry["collective_seq_id"]) - 1
    if entry.get("is_p2p") and operation < _COLLECTIVES:
        operation = OPERATIONS.index("receive_any")
    if operation >= _COLLECTIVES:
        if is_cut or peer == NO_PEER:
            operation, peer = OPERATIONS.index("receive_any"), NO_PEER
        number = counted[group, operation, peer]
        counted[group, operation, peer] += 1
    is_over = bool(entry.get("retired")) or entry.get("state") == "completed"
    dtype, num_bytes = _size(entry)
    return (
        index + 1,
        int(entry["time_created_ns"]),
        0,
        0,
        num_bytes,
        group,
        max(number, 0),
        0,
        sites.setdefault(_site(entry), len(sites)),
        peer,
        operation,
        dtype,
        PHASES.index("train"),
        0 if is_over else int(Flags.END_SEEN),
    )


def _operation(profiling_name: str, members: Group) -> tuple[int, int]:
    """Index in OPERATIONS, and the other side of a message."""
    short = profiling_name.partition(":")[2] or profiling_name
    message = _PEER.search(short)
    if message:
        other = int(message[4])
        name = "send" if message[1] == "send" else "receive"
        return OPERATIONS.index(name), other if other < len(members.ranks) else NO_PEER
    name = short.split(" ")[0]
    name = _NAMES.get(name, name)
    return (OPERATIONS.index(name) if name in OPERATIONS else 0), NO_PEER


def _size(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Index in DTYPES and bytes of the first input, or output where there is no input."""
    sizes = entry.get("input_sizes") or entry.get("output_sizes") or ()
    dtypes = entry.get("input_dtypes") or entry.get("output_dtypes") or ()
    names = [_DTYPES.get(str(dtype), "other") for dtype in dtypes]
    total = sum(
        math.prod(int(length) for length in shape) * _BYTES.get(name, 1)
        for shape, name in zip(sizes, names, strict=False)
    )
    return (DTYPES.index(names[0]) if names else 0), max(total, 0)


def _site(entry: Mapping[str, Any]) -> str:
    for frame in entry.get("frames") or ():
        if "torch/distributed" not in str(frame.get("filename", "")):
            return f"{frame.get('filename')}:{frame.get('line')}"
    return ""
