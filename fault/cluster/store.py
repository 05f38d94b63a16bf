"""The cluster store: what is known of nodes, beyond the jobs that found it out.

PLACE/2026-11-22/WRITER.jsonl    what one process has added on that day (UTC), one record per line
PLACE/2026-11-20/merged-....jsonl    a day that is over, as one file

Several jobs write at once, each into files of its own, so nothing is lost. Days that are over are merged; evidence that is
older than ``KEEP_S`` is dropped then, cordons stay while they stand. Whoever merges writes the whole first and removes
parts after that; a record that is read twice counts once. So two may merge at once, and be killed at any moment.
"""

import hashlib
import os
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from evermesh.checkpoint.stores.places import Place, place_of
from evermesh.fault.cluster.identity import host_name
from evermesh.fault.cluster.records import Record, RecordAdapter
from evermesh.fault.cluster.shelf import shelf_of
from evermesh.fault.cluster.standing import standing_cordons
from evermesh.fault.errors import ClusterUnusable

KEEP_S = 30 * 86400.0
VARIABLE = "EVERMESH_CLUSTER"
_PATIENCE_S = 20.0
_DAY = re.compile(r"(\d{4}-\d\d-\d\d)/[^/.][^/]*\.jsonl")
_TRIES = 5
"""Somebody may merge what is being read."""


@dataclass(frozen=True, slots=True)
class Contents:
    """All that the store holds."""

    records: tuple[Record, ...] = ()
    """Oldest first, each once."""
    problems: tuple[str, ...] = ()
    """Lines that are no records; they are skipped."""


class ClusterStore:
    """The store at ``place``, for one writer. Every method may be called from one thread at a time.

    Raises, in every method:
        ClusterUnusable: the place cannot be read, or written.
    """

    def __init__(self, place: Place) -> None:
        self.place = place if isinstance(place, Path) else place.with_patience(_PATIENCE_S)
        self._writer = f"{host_name()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
        self._known: dict[str, tuple[int, Contents]] = {}
        """By file: its size, and what was in it: a file only grows."""
        try:
            self._shelf = shelf_of(self.place)
        except OSError as error:
            raise ClusterUnusable(self.place, "opened", error) from error

    def add(self, records: Iterable[Record]) -> None:
        """Add records; they are durable when this returns."""
        lines = b"".join(record.model_dump_json().encode() + b"\n" for record in records)
        try:
            self._shelf.append(f"{_day(time.time())}/{self._writer}", lines)
        except OSError as error:
            raise ClusterUnusable(self.place, "written", error) from error

    def read(self) -> Contents:
        """All records of all writers."""
        for attempt in range(_TRIES):
            try:
                return _joined(self._file(name, size) for name, size in sorted(self._files().items()))
            except FileNotFoundError as error:
                if attempt == _TRIES - 1:
                    raise ClusterUnusable(self.place, "read", error) from error
            except OSError as error:
                raise ClusterUnusable(self.place, "read", error) from error
        raise AssertionError

    def tidy(self, now_s: float) -> None:
        """Merge the days before yesterday, without what is too old. May be called by many at once."""
        last = _day(now_s - timedelta(days=2).total_seconds())
        by_day: dict[str, list[str]] = defaultdict(list)
        try:
            for name in self._files():
                by_day[name.partition("/")[0]].append(name)
            standing = {cordon.id for cordon in standing_cordons(self.read().records, now_s)}
            for day, names in sorted(by_day.items()):  # a cordon goes before what has lifted it
                if day <= last:
                    self._merge(day, names, standing, now_s)
        except FileNotFoundError:  # somebody else merges
            return
        except OSError as error:
            raise ClusterUnusable(self.place, "tidied up", error) from error

    def _merge(self, day: str, names: Sequence[str], standing: set[str], now_s: float) -> None:
        held = [self._file(name, None) for name in names]
        kept = [record for record in _joined(held).records if now_s - record.time_s < KEEP_S or record.id in standing]
        content = b"".join(record.model_dump_json().encode() + b"\n" for record in kept)
        whole = f"{day}/merged-{hashlib.blake2b(content, digest_size=8).hexdigest()}.jsonl"
        if kept and whole not in names:
            self._shelf.write(whole, content)
        for name in names:
            if name != whole or not kept:
                self._shelf.remove(name)

    def _files(self) -> dict[str, int]:
        return {name: size for name, size in self._shelf.sizes().items() if _DAY.fullmatch(name)}

    def _file(self, name: str, size: int | None) -> Contents:
        known = self._known.get(name)
        if known is not None and known[0] == size:
            return known[1]
        content = self._shelf.read(name)
        found = _parsed(f"{self.place}/{name}", content)
        self._known[name] = (len(content), found)
        return found


def cluster_place(given: str | None = None) -> Place:
    """Where the store is: what is given, else what EVERMESH_CLUSTER says, else a folder of this user on this machine."""
    named = given or os.environ.get(VARIABLE)
    if named:
        return place_of(named).absolute()
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "evermesh/cluster"


def _parsed(name: str, content: bytes) -> Contents:
    """The records of a file. Its last line, if it has no end, is being written, or was cut short with its writer."""
    records, problems = [], []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        if not line.strip():
            continue
        try:
            records.append(RecordAdapter.validate_json(line))
        except ValidationError as error:
            problems.append(f"{name}, line {number}, is no record and is skipped: {_first(error)}")
    return Contents(tuple(records), tuple(problems))


def _joined(parts: Iterable[Contents]) -> Contents:
    """All of them, oldest first, each record once."""
    by_id: dict[str, Record] = {}
    problems: list[str] = []
    for part in parts:
        by_id |= {record.id: record for record in part.records}
        problems += part.problems
    return Contents(tuple(sorted(by_id.values(), key=lambda record: (record.time_s, record.id))), tuple(problems))


def _first(error: ValidationError) -> str:
    found = error.errors()[0]
    where = ".".join(map(str, found["loc"]))
    return f"{where}: {found['msg']}" if where else str(found["msg"])


def _day(time_s: float) -> str:
    return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d}"
