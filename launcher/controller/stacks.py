"""What the ranks of an attempt were doing when it was ended, read from the files that they wrote it into."""

import itertools
import linecache
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from evermesh.launcher.run_directory import Run

_FRAMES = 4
"""Innermost frames that are told; the file has all, of all threads."""
_MOST_RANKS = 16
_TAIL_BYTES = 1 << 18
_RECORDER = "/fault/recorder/"
"""It stands between whoever waits and torch."""
_HEAD = re.compile(r"^\S+ \S+ generation (\d+), rank \d+: ", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')


class Doing(NamedTuple):
    """What one rank was doing."""

    frames: tuple[str, ...]
    """Innermost first, of the thread that trains: ``FILE:LINE FUNCTION``."""
    waits: bool
    """For other ranks: in a collective, or for a message."""


def stacks_of(run: Run, generation: int, world_size: int) -> dict[int, Doing]:
    """By rank what it was doing; only ranks that wrote it down."""
    parts = {
        rank: _doing(_last_part(run.logs / f"rank-{rank}.stacks", generation))
        for rank in range(min(world_size, _MOST_RANKS))
    }
    return {rank: doing for rank, doing in parts.items() if doing is not None}


def told_stacks(ranks: Mapping[int, Doing]) -> str:
    """One line per rank, those first that did not wait for others."""
    lines = ["what the ranks were doing (all of it: evermesh logs --stacks):"]
    for rank, doing in sorted(ranks.items(), key=lambda item: item[1].waits):
        how = "waited for others in" if doing.waits else "was in"
        lines.append(f"  rank {rank} {how} {' < '.join(doing.frames)}")
    return "\n".join(lines)


def _last_part(file: Path, generation: int) -> str:
    """What was written down last, if it was in that generation."""
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        text = opened.read().decode(errors="replace")
    heads = list(_HEAD.finditer(text))
    return text[heads[-1].end() :] if heads and int(heads[-1].group(1)) == generation else ""


def _doing(text: str) -> Doing | None:
    """Of the thread that trains: the first one of the process, and so the last in the list."""
    _, _, last = text.rpartition("(most recent call first):\n")
    found = itertools.takewhile(bool, map(_FRAME.match, last.splitlines()))
    told = (match for match in found if match and _RECORDER not in match[1])
    frames = [(match[1], int(match[2]), match[3]) for match in itertools.islice(told, _FRAMES)]
    if not frames:
        return None
    file, line, _ = frames[0]
    waits = "/torch/distributed/" in file or ".wait(" in linecache.getline(file, line)
    return Doing(tuple(f"{Path(file).name}:{line} {function}" for file, line, function in frames), waits)
