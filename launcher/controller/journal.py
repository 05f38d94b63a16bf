"""What the controller of a run did and why: an append-only file, and an SQLite index of it.

The file is the truth: an entry counts when its line is on disk, and a controller that was killed goes on where the file
ends. The index serves questions; where it is missing or behind it is made again from the file.
"""

import errno
import json
import os
import sqlite3
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

_RESERVE_BYTES = 1 << 16


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


class Copies(Protocol):
    """The copies of a journal on other nodes."""

    def commit(self, line: str) -> None:
        """Have the next line copied."""

    def retract(self) -> None:
        """The last line was not written into the journal itself."""


class Journal:
    """The journal of one run, for its only writer. Entries are on disk, and copied, when ``append`` returns.

    A context manager.
    """

    def __init__(self, path: Path, copies: Copies | None = None) -> None:
        self._copies = copies
        self.entries, size = _read(path)
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._descriptor, size)  # without the line that a killed writer left unfinished
        self._index = JournalIndex(path.with_suffix(".sqlite"))
        self._index.catch_up(self.entries)
        self._reserve = path.with_suffix(".reserve")
        with suppress(OSError):
            _reserve(self._reserve)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.make_room()
        self._index.close()
        os.close(self._descriptor)

    def append(self, generation: int, kind: str, reason: str, **fields: JsonValue) -> Entry:
        """Write down what is about to be done.

        Raises:
            OSError: it could not be written or copied; nothing of it is in the file, and nothing may be done then.
        """
        entry = Entry(
            seq=len(self.entries) + 1,
            time_s=time.time(),
            generation=generation,
            kind=kind,
            reason=reason,
            fields=fields,
        )
        line = entry.model_dump_json()
        if self._copies is not None:
            self._copies.commit(line)
        try:
            self._write_patiently(line.encode() + b"\n")
        except OSError:
            if self._copies is not None:
                self._copies.retract()
            raise
        self.entries.append(entry)
        self._index.catch_up(self.entries)
        return entry

    def make_room(self) -> None:
        """Give up the space that is kept so that the end of a job can be told on a full disk."""
        with suppress(OSError):
            self._reserve.unlink(missing_ok=True)

    def _write_patiently(self, line: bytes) -> None:
        try:
            self._write(line)
        except OSError:
            self.make_room()
            self._write(line)

    def _write(self, line: bytes) -> None:
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, f"only {written} of {len(line)} bytes of the journal were taken")
            os.fdatasync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise


class JournalIndex:
    """Answers questions about a journal. It may be deleted at any time; without room for it, it falls behind."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: sqlite3.Connection | None = None

    def catch_up(self, entries: Sequence[Entry]) -> None:
        """Index what is missing, and throw away what the journal does not have."""
        for _ in range(2):
            try:
                self._fill(self._opened(), entries)
            except (sqlite3.Error, OSError):  # torn by a crash, deleted, or no room: made anew once
                self.close()
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
            else:
                return

    def find(self, *, after: int = 0, kind: str | None = None, limit: int = 1000) -> list[Entry]:
        """Entries with a higher number than ``after``, oldest first."""
        rows = self._opened().execute(
            "SELECT * FROM entries WHERE seq > ? AND (? IS NULL OR kind = ?) ORDER BY seq LIMIT ?",
            (after, kind, kind, limit),
        )
        names = ("seq", "time_s", "generation", "kind", "reason", "fields")
        return [
            Entry.model_validate({**dict(zip(names, row, strict=True)), "fields": json.loads(row[5])}) for row in rows
        ]

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()
            self._database = None

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            self._database = sqlite3.connect(self._path, check_same_thread=False)
            self._database.execute("PRAGMA synchronous = OFF")  # the journal is the truth
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS entries "
                "(seq INTEGER PRIMARY KEY, time_s REAL, generation INTEGER, kind TEXT, reason TEXT, fields TEXT)"
            )
            self._database.execute("CREATE INDEX IF NOT EXISTS by_kind ON entries (kind, seq)")
        return self._database

    @staticmethod
    def _fill(database: sqlite3.Connection, entries: Sequence[Entry]) -> None:
        newest = database.execute("SELECT seq, time_s FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        known = newest[0] if newest else 0
        if known > len(entries) or (known and entries[known - 1].time_s != newest[1]):  # of another journal
            database.execute("DELETE FROM entries")
            known = 0
        rows = [
            (entry.seq, entry.time_s, entry.generation, entry.kind, entry.reason, json.dumps(entry.fields))
            for entry in entries[known:]
        ]
        database.executemany("INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?)", rows)
        database.commit()


def _reserve(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, _RESERVE_BYTES)
    finally:
        os.close(descriptor)


def read_journal(path: Path) -> Sequence[Entry]:
    """The entries of a journal, oldest first, up to the first line that is none: a killed writer left it."""
    return _read(path)[0]


def journal_lines(path: Path) -> list[str]:
    """The lines of a journal as they were written."""
    size = _read(path)[1]
    return path.read_bytes()[:size].decode().split("\n")[:-1] if size else []


def restore_journal(path: Path, lines: Sequence[str]) -> None:
    """Put ``lines`` in the place of a journal; whoever still writes into the old file writes for nobody."""
    new = path.with_suffix(".new")
    with new.open("wb") as file:
        file.write("".join(f"{line}\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def launch_number(entries: Sequence[Entry]) -> int | None:
    """Number of the entry of the newest launch; None if there is none."""
    return next((entry.seq for entry in reversed(entries) if entry.kind == "launch"), None)


def _read(path: Path) -> tuple[list[Entry], int]:
    """The entries, and the bytes that they take."""
    entries: list[Entry] = []
    size = 0
    if not path.is_file():
        return entries, size
    with path.open("rb") as lines:
        for line in lines:
            try:
                entry = Entry.model_validate_json(line)
            except ValidationError:
                break
            if not line.endswith(b"\n") or entry.seq != len(entries) + 1:
                break
            entries.append(entry)
            size += len(line)
    return entries, size
