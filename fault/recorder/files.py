"""Files of records in whatever form: JSON lines, rings, and dumps of torch's flight recorder."""

from collections.abc import Callable, Sequence
from pathlib import Path

from evermesh.fault.errors import RecordsUnreadable
from evermesh.fault.recorder.flight_dumps import Dump, parse_dump, traces_of
from evermesh.fault.recorder.json_lines import read_json_lines
from evermesh.fault.recorder.trace import RankTrace

RING_READERS: dict[bytes, Callable[[Path], RankTrace]] = {}
"""Readers of binary forms, by the bytes with which such files begin."""
_HEAD = 4096


def read_files(paths: Sequence[Path]) -> list[RankTrace]:
    """The ranks of one job from all its files.

    Raises:
        RecordsUnreadable: a file is damaged or of no known form.
        OSError: a file cannot be read.
    """
    traces: list[RankTrace] = []
    dumps: list[Dump] = []
    for path in paths:
        with path.open("rb") as file:
            head = file.read(_HEAD)
        reader = next((read for magic, read in RING_READERS.items() if head.startswith(magic)), None)
        if reader is not None:
            traces.append(reader(path))
        elif head[:1] == b"\x80" or _is_document(head):
            dumps.append(parse_dump(path.read_bytes(), path, path.stat().st_mtime_ns))
        elif head.lstrip()[:1] == b"{":
            with path.open("rb") as file:
                traces += read_json_lines(file, str(path))
        else:
            raise RecordsUnreadable(str(path), "it is of no known form" if head else "it is empty")
    return traces + traces_of(dumps)


def _is_document(head: bytes) -> bool:
    """Whether a file is the JSON object of a dump, not one object on each line."""
    return head.lstrip()[:1] == b"{" and any(key in head for key in (b'"entries"', b'"pg_config"', b'"pg_status"'))
