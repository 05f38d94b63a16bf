"""A copy of the journal on the disk of a node: every line with a digest of all up to it.

``copy.jsonl``  {"digest": ..., "line": ...}, one per line of the journal; durable when ``write`` returns. What a killed
writer left unfinished, and whatever follows a line that is not what it was, is cut off when it is opened.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import xxhash

EMPTY = ""
"""Digest of no lines."""


def chained(digest: str, line: str) -> str:
    """Digest of a journal of which all but its last line have ``digest``."""
    return xxhash.xxh3_128_hexdigest(f"{digest}\0{line}".encode())


class Chain:
    """Lines with their digests, in memory."""

    def __init__(self, lines: Sequence[str] = ()) -> None:
        self.lines: list[str] = []
        self._digests = [EMPTY]
        self.extend(lines)

    def __len__(self) -> int:
        return len(self.lines)

    def digest(self, length: int) -> str:
        """Digest of the first ``length`` lines."""
        return self._digests[length]

    def extend(self, lines: Sequence[str]) -> None:
        """Add lines."""
        for line in lines:
            self._digests.append(chained(self._digests[-1], line))
            self.lines.append(line)

    def cut(self, length: int) -> None:
        """Keep the first ``length`` lines."""
        del self.lines[length:], self._digests[length + 1 :]

    def agreeing(self, after: int, lines: Sequence[str]) -> int:
        """How many of ``lines`` are already there, behind line ``after``."""
        pairs = zip(self.lines[after:], lines, strict=False)
        return next(
            (number for number, (one, other) in enumerate(pairs) if one != other), min(len(self) - after, len(lines))
        )


class DiskCopy:
    """The copy in ``path``, for its only writer."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        lines, self._ends = _read(path)
        self.chain = Chain(lines)
        os.ftruncate(self._descriptor, self._ends[-1])

    def write(self, after: int, lines: Sequence[str]) -> None:
        """Replace what is behind line ``after`` by ``lines``.

        Raises:
            OSError: it could not be written; lines up to ``after`` are there.
        """
        if after < len(self.chain):
            os.ftruncate(self._descriptor, self._ends[after])
            self.chain.cut(after)
            del self._ends[after + 1 :]
        self.chain.extend(lines)
        rows = [_row(self.chain.digest(number + 1), line) for number, line in enumerate(lines, after)]
        try:
            _write_all(self._descriptor, b"".join(rows), self._ends[-1])
            os.fdatasync(self._descriptor)
        except OSError:
            self.chain.cut(after)
            os.ftruncate(self._descriptor, self._ends[-1])
            raise
        for row in rows:
            self._ends.append(self._ends[-1] + len(row))

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def read_copy(path: Path) -> list[str]:
    """The lines of the copy in ``path`` that are what they were."""
    return _read(path)[0]


def _read(path: Path) -> tuple[list[str], list[int]]:
    """The lines up to the first that does not follow from those before, and where each ends, bytes."""
    found, ends, digest = [], [0], EMPTY
    with path.open("rb") as rows:
        for row in rows:
            try:
                values = json.loads(row)
                line, told = values["line"], values["digest"]
            except (ValueError, TypeError, KeyError):
                break
            digest = chained(digest, line)
            if told != digest or not row.endswith(b"\n"):
                break
            found.append(line)
            ends.append(ends[-1] + len(row))
    return found, ends


def _row(digest: str, line: str) -> bytes:
    return json.dumps({"digest": digest, "line": line}).encode() + b"\n"


def _write_all(descriptor: int, content: bytes, offset: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written
