"""What the ranks of an attempt were doing when it was ended, read from the files that they wrote it into."""

import re
from collections.abc import Mapping
from pathlib import Path

from evermesh.launcher.run_directory import Run

_FRAMES = 4
"""Innermost frames that are told; the file has all, of all threads."""
_MOST_RANKS = 16
_TAIL_BYTES = 1 << 18
_HEAD = re.compile(r"^\S+ \S+ generation (\d+), rank \d+: ", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')


def stacks_of(run: Run, generation: int, world_size: int) -> dict[int, tuple[str, ...]]:
    """By rank the innermost frames of the thread that trains, ``FILE:LINE FUNCTION``; only of ranks that wrote them down."""
    found = {}
    for rank in range(min(world_size, _MOST_RANKS)):
        frames = _frames(_last_part(run.logs / f"rank-{rank}.stacks", generation))
        if frames:
            found[rank] = frames
    return found


def told_stacks(doing: Mapping[int, tuple[str, ...]]) -> str:
    """One line per rank, innermost frame first."""
    lines = (f"  rank {rank}: {' < '.join(frames)}" for rank, frames in doing.items())
    return "\n".join(("what the ranks were doing (all of it: evermesh logs --stacks):", *lines))


def _last_part(file: Path, generation: int) -> str:
    """What was written down last, if it was in that generation."""
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - _TAIL_BYTES))
        text = opened.read().decode(errors="replace")
    heads = list(_HEAD.finditer(text))
    return text[heads[-1].end() :] if heads and int(heads[-1].group(1)) == generation else ""


def _frames(text: str) -> tuple[str, ...]:
    """Of the thread that trains: the first one of the process, and so the last in the list."""
    _, _, last = text.rpartition("(most recent call first):\n")
    found: list[str] = []
    for line in last.splitlines():
        match = _FRAME.match(line)
        if match is None or len(found) == _FRAMES:
            break
        found.append(f"{Path(match[1]).name}:{match[2]} {match[3]}")
    return tuple(found)
