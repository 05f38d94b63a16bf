"""Pages of the logs of ranks. A page has at most 64 KiB, whatever a rank has printed."""

import os
import stat
from pathlib import Path
from typing import NamedTuple

PAGE_BYTES = 1 << 16


class LogPage(NamedTuple):
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
    is_cut = begin > 0 and after is None
    first = content.find(b"\n") + 1 if is_cut else 0  # the rest of a line that began before
    last = content.rfind(b"\n") + 1 if begin + len(content) < size else len(content)
    content = content[first : last if last > first else len(content)]
    return LogPage(begin + first, begin + first + len(content), size, content.decode(errors="replace"))
