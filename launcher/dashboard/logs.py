"""Pages of the logs of ranks. A page has at most 64 KiB, whatever a rank has printed."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

PAGE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class LogPage:
    """Some whole lines of a log; of a longer line, a part."""

    begin: int
    """Where it begins in the file, bytes."""
    end: int
    size: int
    """Of the file."""
    text: str


def read_page(path: Path, *, before: int | None = None, after: int | None = None) -> LogPage:
    """The page that ends at ``before`` or begins at ``after``, bytes; the last one without both.

    Raises:
        OSError: there is no such file, or it is a link or none of the ordinary ones.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path} is no ordinary file")
        size = found.st_size
        if after is not None:
            begin, end = min(after, size), min(after + PAGE_BYTES, size)
        else:
            end = size if before is None else min(before, size)
            begin = max(0, end - PAGE_BYTES)
        file.seek(begin)
        content = file.read(end - begin)
    first, last = 0, len(content)
    if after is None and begin > 0:
        first = content.find(b"\n") + 1  # the rest of a line that began before
    elif end < size:
        last = content.rfind(b"\n") + 1
    content = content[first:last] or content  # a part of a line that is longer than a page
    begin = begin if first in (0, last) else begin + first
    return LogPage(begin, begin + len(content), size, content.decode(errors="replace"))
