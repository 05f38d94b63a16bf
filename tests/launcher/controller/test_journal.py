"""The journal survives a writer that is killed at any byte, a full disk, and the loss of its index."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from evermesh.launcher.controller.journal import (
    Journal,
    JournalIndex,
    journal_lines,
    launch_number,
    read_journal,
    restore_journal,
)
from evermesh.launcher.errors import NotReplicated

KINDS = ("launch", "node", "transition", "attempt", "node")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of five entries."""
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for number, kind in enumerate(KINDS, 1):
            journal.append(number // 3, kind, f"because {number}", number=number, name="Zoë")
    return path


def found(path: Path, **query: object) -> list[int]:
    """Numbers of what the index finds."""
    index = JournalIndex(path.with_suffix(".sqlite"))
    try:
        return [entry.seq for entry in index.find(**query)]  # type: ignore[arg-type]
    finally:
        index.close()


def test_entries_are_numbered_and_read_back_as_they_were_written(path: Path) -> None:
    entries = read_journal(path)
    assert [(entry.seq, entry.kind) for entry in entries] == list(enumerate(KINDS, 1))
    assert entries[4].fields == {"number": 5, "name": "Zoë"}
    with Journal(path) as journal:
        assert journal.entries == entries


def test_a_writer_killed_at_any_byte_leaves_every_entry_before_that_and_the_next_one_follows(path: Path) -> None:
    content = path.read_bytes()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        whole = content[:size].count(b"\n")
        assert len(read_journal(path)) == whole
        with Journal(path) as journal:
            journal.append(9, "next", "it goes on")
        assert [entry.seq for entry in read_journal(path)] == list(range(1, whole + 2))
        assert found(path) == list(range(1, whole + 2))


def test_a_line_that_is_no_entry_ends_the_journal_there_and_what_is_written_next_is_not_lost(path: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + b"\0" * 20 + b"\n" + lines[3])
    with Journal(path) as journal:
        journal.append(9, "next", "it goes on")
    assert [entry.kind for entry in read_journal(path)] == ["launch", "node", "next"]


@pytest.mark.parametrize("damage", ["missing", "behind", "ahead", "of another journal", "no database", "torn"])
def test_the_index_is_made_again_from_the_journal(path: Path, tmp_path: Path, damage: str) -> None:
    index = path.with_suffix(".sqlite")
    if damage == "missing":
        index.unlink()
    elif damage == "behind":
        old = index.read_bytes()
        with Journal(path) as journal:
            journal.append(2, "node", "one that the index does not have")
        index.write_bytes(old)
    elif damage == "ahead":
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    elif damage == "of another journal":
        with Journal(tmp_path / "other.jsonl") as other:
            for _ in KINDS:
                other.append(0, "other", "of another run")
        index.write_bytes((tmp_path / "other.sqlite").read_bytes())
    elif damage == "no database":
        index.write_bytes(b"this is no database, though it is as long as one" * 100)
    else:
        content = index.read_bytes()
        index.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with Journal(path) as journal:
        entries = journal.entries
    assert found(path) == [entry.seq for entry in entries]
    assert found(path, kind="node") == [entry.seq for entry in entries if entry.kind == "node"]
    assert found(path, after=2, limit=1) == [3]


def test_an_index_deleted_under_the_writer_costs_no_entry(path: Path) -> None:
    with Journal(path) as journal:
        path.with_suffix(".sqlite").unlink()
        journal.append(2, "node", "written without an index")
        journal.append(2, "node", "and once more")
    assert len(read_journal(path)) == 7
    with Journal(path):
        assert found(path) == [1, 2, 3, 4, 5, 6, 7]


FILL = """
import resource, signal, sys
from pathlib import Path
from evermesh.launcher.controller.journal import Journal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Journal(Path(sys.argv[1])) as journal:
    limit = Path(sys.argv[1]).stat().st_size + int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        journal.append(3, "node", "x" * 500)
    except OSError as error:
        print(type(error).__name__, error.errno)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    journal.append(3, "node", "after making room")
"""


@pytest.mark.parametrize("room", [0, 1, 300])
def test_a_full_disk_is_told_and_nothing_of_the_entry_stays(path: Path, room: int) -> None:
    command = [sys.executable, "-c", FILL, str(path), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.startswith("OSError")
    assert [entry.reason for entry in read_journal(path)][5:] == ["after making room"]
    assert b"xxx" not in path.read_bytes()


def test_no_room_for_the_index_is_no_reason_not_to_write(path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    path.with_suffix(".sqlite").unlink()
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # the index would take more than a page
        with Journal(path) as journal:
            journal.append(2, "node", "without an index")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    with Journal(path):
        assert found(path) == [1, 2, 3, 4, 5, 6]


class Copies:
    """Copies on other nodes, which can be out of reach."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.are_reached = True

    def commit(self, line: str) -> None:
        if not self.are_reached:
            raise NotReplicated("only 1 of 3 agents answer")
        self.lines.append(line)

    def retract(self) -> None:
        self.lines.pop()


def test_an_entry_is_copied_before_it_is_written_and_neither_stands_without_the_other(tmp_path: Path) -> None:
    copies = Copies()
    with Journal(tmp_path / "journal.jsonl", copies) as journal:
        journal.append(0, "launch", "first")
        copies.are_reached = False
        with pytest.raises(NotReplicated):
            journal.append(0, "node", "not copied")
        copies.are_reached = True
        journal.append(0, "node", "second")
        descriptor, journal._descriptor = journal._descriptor, os.open("/dev/full", os.O_RDWR)
        with pytest.raises(OSError, match=r"argument|space"):
            journal.append(0, "node", "not written")
        os.close(journal._descriptor)
        journal._descriptor = descriptor
        journal.append(0, "node", "third")
    assert copies.lines == journal_lines(tmp_path / "journal.jsonl")
    assert [entry.reason for entry in read_journal(tmp_path / "journal.jsonl")] == ["first", "second", "third"]


def test_a_journal_is_restored_byte_for_byte_and_the_old_file_is_nobodys(path: Path) -> None:
    before, lines = path.read_bytes(), journal_lines(path)
    with Journal(path) as old:
        restore_journal(path, lines)
        old.append(9, "node", "of a controller that was stopped")
    assert path.read_bytes() == before
    assert journal_lines(path) == lines
    assert launch_number(read_journal(path)) == 1
