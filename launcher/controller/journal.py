"""What the controller of a run did and why: an append-only file, and an SQLite index of it.

The file is the truth: an entry counts when its line is on disk, and a controller that was killed goes on where the file
ends. The index serves questions; where it is missing or behind it is made again from the file.
"""

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError


class Entry(BaseModel):
    """One line of the journal."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seq: int
    """From 1, without gaps."""
    time_s: float
    """Wall clock, seconds since 1970; for people only."""
    generation: int
    kind: str
    reason: str
    fields: dict[str, JsonValue] = Field(default_factory=dict)


class Journal:
    """The journal of one run, for its only writer. Entries are on disk when ``append`` returns. A context manager."""

    def __init__(self, path: Path) -> None:
        self.entries = list(read_journal(path))
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._cut_torn_line()
        self._index = JournalIndex(path.with_suffix(".sqlite"))
        self._index.catch_up(self.entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._index.close()
        os.close(self._descriptor)

    def append(self, generation: int, kind: str, reason: str, **fields: JsonValue) -> Entry:
        """Write down what is about to be done.

        Raises:
            OSError: it could not be written; nothing may be done then.
        """
        entry = Entry(
            seq=len(self.entries) + 1,
            time_s=time.time(),
            generation=generation,
            kind=kind,
            reason=reason,
            fields=fields,
        )
        line = entry.model_dump_json().encode() + b"\n"
        written = os.write(self._descriptor, line)
        if written != len(line):
            self._cut_torn_line()
            raise OSError(f"only {written} of {len(line)} bytes of the journal were taken")
        os.fdatasync(self._descriptor)
        self.entries.append(entry)
        self._index.add(entry)
        return entry

    def _cut_torn_line(self) -> None:
        """Remove the line that a killed writer, or a full disk, left unfinished."""
        size = os.fstat(self._descriptor).st_size
        content = os.pread(self._descriptor, size, 0)
        os.ftruncate(self._descriptor, content.rfind(b"\n") + 1)


class JournalIndex:
    """Answers questions about a journal. It may be deleted at any time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._database = self._open()
        except sqlite3.DatabaseError:  # torn by a crash: made anew
            path.unlink(missing_ok=True)
            self._database = self._open()

    def add(self, entry: Entry) -> None:
        """Index one entry."""
        self._database.execute(
            "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?)",
            (entry.seq, entry.time_s, entry.generation, entry.kind, entry.reason, json.dumps(entry.fields)),
        )
        self._database.commit()

    def catch_up(self, entries: list[Entry]) -> None:
        """Index what is missing; throw away what the journal does not have."""
        (last,) = self._database.execute("SELECT coalesce(max(seq), 0) FROM entries").fetchone()
        if last > len(entries):
            self._database.execute("DELETE FROM entries")
            last = 0
        for entry in entries[last:]:
            self.add(entry)

    def find(self, *, after: int = 0, kind: str | None = None, limit: int = 1000) -> list[Entry]:
        """Entries with a higher number than ``after``, oldest first."""
        rows = self._database.execute(
            "SELECT * FROM entries WHERE seq > ? AND (? IS NULL OR kind = ?) ORDER BY seq LIMIT ?",
            (after, kind, kind, limit),
        )
        names = ("seq", "time_s", "generation", "kind", "reason", "fields")
        return [
            Entry.model_validate({**dict(zip(names, row, strict=True)), "fields": json.loads(row[5])}) for row in rows
        ]

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self._path)
        database.execute("PRAGMA synchronous = OFF")  # the journal is the truth
        database.execute(
            "CREATE TABLE IF NOT EXISTS entries "
            "(seq INTEGER PRIMARY KEY, time_s REAL, generation INTEGER, kind TEXT, reason TEXT, fields TEXT)"
        )
        database.execute("CREATE INDEX IF NOT EXISTS by_kind ON entries (kind, seq)")
        return database


def read_journal(path: Path) -> Iterator[Entry]:
    """The entries of a journal, oldest first, up to the first line that is none: a killed writer left it."""
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                yield Entry.model_validate_json(line)
            except ValidationError:
                return
