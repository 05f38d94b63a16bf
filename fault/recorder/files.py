"""Files of records in whatever form: JSON lines, rings, and dumps of torch's flight recorder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evermesh.fault.errors import RecordsUnreadable
from evermesh.fault.process_state import ProcessState
from evermesh.fault.recorder import ring_format
from evermesh.fault.recorder.area import rings_of
from evermesh.fault.recorder.errors import RingUnreadable
from evermesh.fault.recorder.flight_dumps import Dump, parse_dump, traces_of
from evermesh.fault.recorder.json_lines import read_json_lines
from evermesh.fault.recorder.reader import RingState, process_of, read_ring
from evermesh.fault.recorder.trace import RankTrace

_RING = ring_format.MAGIC.to_bytes(8, "little")
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
        if head.startswith(_RING):
            traces.append(_read_ring(path)[0])
        elif head[:1] == b"\x80" or _is_document(head):
            dumps.append(parse_dump(path.read_bytes(), path, path.stat().st_mtime_ns))
        elif head.lstrip()[:1] == b"{":
            with path.open("rb") as file:
                traces += read_json_lines(file, str(path))
        else:
            raise RecordsUnreadable(str(path), "it is of no known form" if head else "it is empty")
    return traces + traces_of(dumps)


def read_job(directory: Path) -> tuple[list[RankTrace], Mapping[int, ProcessState | None]]:
    """The ranks of the run, or of the script with its logs, in ``directory``, by their rings on this machine or the copies
    that were kept; with the states of their processes while any of them runs, None for one that does not.

    Raises:
        RecordsUnreadable: there are no rings, or one is damaged.
        OSError: one cannot be read.
    """
    read = [_read_ring(ring.path) for ring in rings_of(directory)]
    if not read:
        raise RecordsUnreadable(str(directory), "there are no records of ranks in it")
    states = {trace.rank: process_of(trace, state) for trace, state in read}
    if not any(states.values()):
        return [trace for trace, _ in read], {}
    return [
        _read_ring(ring.path)[0] for ring in rings_of(directory)
    ], states  # read again: what has ended writes no more


def _read_ring(path: Path) -> tuple[RankTrace, RingState]:
    try:
        return read_ring(path)
    except RingUnreadable as error:
        raise RecordsUnreadable(str(path), str(error)) from error


def _is_document(head: bytes) -> bool:
    """Whether a file is the JSON object of a dump, not one object on each line."""
    return head.lstrip()[:1] == b"{" and any(key in head for key in (b'"entries"', b'"pg_config"', b'"pg_status"'))
