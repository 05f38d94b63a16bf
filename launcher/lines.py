"""Files of lines that others append to."""

from collections.abc import Iterator
from pathlib import Path


class Lines:
    """The lines that a growing file gets from now on; unfinished ones wait."""

    def __init__(self, path: Path, *, from_start: bool = False, offset: int | None = None) -> None:
        """``offset``: bytes at the beginning that are known; by default all that there are, or none ``from_start``."""
        self._path = path
        known = path.stat().st_size if path.is_file() and not from_start else 0
        self.offset = known if offset is None else offset
        """Bytes of the lines that were given."""

    def new(self) -> Iterator[bytes]:
        """The lines since the last call."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return
        if size < self.offset:  # an unfinished line was cut off
            self.offset = size
        if size == self.offset:
            return
        with self._path.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield line
