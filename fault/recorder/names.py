"""The strings of a ring: JSON lines, each about one thing, appended and never changed; a later line about it counts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evermesh.fault.recorder.record import Group

NO_NAME = 0
"""Index of no group and of no call site."""


@dataclass(frozen=True, slots=True)
class Names:
    """What the names of a ring say."""

    node: str = ""
    owner: str = ""
    """Directory of the run, or whatever its maker is known by."""
    groups: "Mapping[int, Group]" = field(default_factory=dict)
    sites: Mapping[int, str] = field(default_factory=dict)


def ring_line(node: str, owner: str) -> bytes:
    """The first line."""
    return _line({"ring": {"node": node, "owner": owner}})


def group_line(index: int, name: str, ranks: Sequence[int], axis: str) -> bytes:
    """Names a group; its ranks as ranges, so that a world of thousands takes a few bytes."""
    return _line({"group": index, "name": name, "ranks": list(ranges_of(ranks)), "axis": axis})


def site_line(index: int, text: str) -> bytes:
    """Names a call site."""
    return _line({"site": index, "text": text})


def parse_names(lines: bytes) -> Names:
    """The names that ``lines`` hold; what is cut off or damaged is left out."""
    from evermesh.fault.recorder.record import Group

    ring: dict[str, str] = {}
    groups: dict[int, Group] = {}
    sites: dict[int, str] = {}
    for line in lines.splitlines():
        try:
            found = json.loads(line)
            if "ring" in found:
                ring = {"node": str(found["ring"]["node"]), "owner": str(found["ring"]["owner"])}
            elif "group" in found:
                ranks = tuple(rank for part in found["ranks"] for rank in range(*part))
                groups[int(found["group"])] = Group(str(found["name"]), ranks, str(found["axis"]))
            else:
                sites[int(found["site"])] = str(found["text"])
        except (ValueError, KeyError, TypeError):
            continue
    return Names(**ring, groups=groups, sites=sites)


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"


def ranges_of(ranks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """``ranks`` as (start, stop, step) of ascending ranges, in their order."""
    begin = 0
    while begin < len(ranks):
        end = begin + 1
        step = ranks[end] - ranks[begin] if end < len(ranks) and ranks[end] > ranks[begin] else 1
        while end < len(ranks) and ranks[end] - ranks[end - 1] == step:
            end += 1
        yield ranks[begin], ranks[end - 1] + 1, step
        begin = end
