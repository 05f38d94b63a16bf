"""Files of lines that others append to."""

from collections.abc import Iterator
from pathlib import Path


class Lines:
    """The lines that a growing file gets from now on; unfinished ones wait."""

    def __init__(self, path: Path, *, from_start: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.is_file() and not from_start else 0

    def new(self) -> Iterator[bytes]:
        """The lines since the last call."""
        try:
            size = self._path.stat().st_size
        except FileNotFoundError:
            return
        if size < self._offset:  # an unfinished line was cut off
            self._offset = size
        if size == self._offset:
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield line
