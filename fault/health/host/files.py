"""What the kernel tells in small files, read at one moment."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from glob import iglob
from pathlib import Path
from typing import NamedTuple

from evermesh.fault.health.verdicts import Verdict

Files = Mapping[str, str]
"""Text by path below the root, without a leading slash; what is not there or may not be read is missing."""
_MOST_BYTES = 1 << 20


class Look(NamedTuple):
    """What a check goes by."""

    now: Files
    first: Files | None = None
    """At the first look of this watch: counters are compared with it. None: this is the first."""
    last: Files | None = None
    """At the look before this one."""


class FileCheck(NamedTuple):
    """A check of files: which ones it wants, and what it concludes. ``judge`` is pure."""

    patterns: Sequence[str]
    judge: Callable[[Look], Sequence[Verdict]]


def read_files(patterns: Sequence[str], root: Path = Path("/")) -> dict[str, str]:
    """The text of all files that match; at most a MiB of each."""
    return dict(_read(patterns, root))


def number(files: Files, path: str) -> int | None:
    """The whole number that a file holds; None where it holds none."""
    try:
        return int(files[path].split()[0], 0)
    except (KeyError, IndexError, ValueError):
        return None


def table(text: str) -> dict[str, int]:
    """Lines such as ``MemTotal:  24684084 kB`` or ``oom_kill 0``: the number by name."""
    found = {}
    for line in text.splitlines():
        name, _, rest = line.replace(":", " ").partition(" ")
        value = rest.split()
        if value and value[0].lstrip("-").isdigit():
            found[name] = int(value[0])
    return found


def names(files: Files, folder: str) -> list[str]:
    """The entries of ``folder`` that are known, sorted."""
    start = f"{folder}/"
    return sorted({path.removeprefix(start).partition("/")[0] for path in files if path.startswith(start)})


def _read(patterns: Sequence[str], root: Path) -> Iterator[tuple[str, str]]:
    for pattern in patterns:
        for path in iglob(pattern, root_dir=root) if any(sign in pattern for sign in "*[?") else (pattern,):
            try:
                with (root / path).open("rb", buffering=0) as file:
                    yield path, (file.read(_MOST_BYTES) or b"").decode(errors="replace")
            except OSError:  # it went away, or the driver does not tell
                continue
