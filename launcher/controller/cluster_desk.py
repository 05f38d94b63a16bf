"""The cluster store as a controller uses it: nothing that the job does waits for it, and it may be away."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from evermesh.checkpoint.stores.places import place_of
from evermesh.fault.cluster.records import Record
from evermesh.fault.cluster.store import ClusterStore
from evermesh.parallelism.errors import EvermeshError

_AGAIN_S, _AGAIN_OBJECTS_S = 5.0, 30.0
"""How often it is read: cordons are to be seen soon."""
_FIRST_WAIT_S = 10.0
_CLOSE_WAIT_S = 5.0
_MOST_WAITING = 10_000


class ClusterDesk:
    """Reads and writes the store at ``place`` beside the job; ``say`` is told, once each time, that it cannot.

    A folder is read when this is made, as the directory of the run is; an object store in a thread. Without ``keeps`` nothing
    is written: what is added counts for this job only.
    """

    def __init__(self, place: str, say: Callable[[str], None], *, keeps: bool = True) -> None:
        self._place, self._say, self._keeps = place_of(place), say, keeps
        self._lock = threading.Lock()
        self._began_s = self._asked_s = time.monotonic()
        self._store: ClusterStore | None = None
        self._read: tuple[Record, ...] = ()
        self._waiting: list[Record] = []
        """Not written yet."""
        self._records: tuple[Record, ...] | None = ()
        """All of it, oldest first; None: that has changed."""
        self._words: tuple[Record, ...] = ()
        self._problem, self._told = "", ""
        self._thread: threading.Thread | None = None
        self._is_known = self._is_tidy = False
        if isinstance(self._place, Path):
            self._exchange(writes=False)
        else:
            self._begin()

    @property
    def is_known(self) -> bool:
        """Whether it has been read, or is not waited for any longer."""
        return self._is_known or time.monotonic() - self._began_s > _FIRST_WAIT_S

    @property
    def records(self) -> Sequence[Record]:
        """All that was read, and what is about to be written, oldest first."""
        with self._lock:
            if self._records is None:
                found = {record.id: record for record in (*self._read, *self._waiting)}
                self._records = tuple(sorted(found.values(), key=lambda record: (record.time_s, record.id)))
                self._words = tuple(record for record in self._records if record.record != "evidence")
            return self._records

    @property
    def words(self) -> Sequence[Record]:
        """Cordons and their ends among these."""
        return self._words if self.records else ()

    def add(self, *records: Record) -> None:
        """Have these written soon."""
        with self._lock:
            self._waiting, self._records = (self._waiting + list(records))[-_MOST_WAITING:], None

    def recall(self, records: Sequence[Record]) -> None:
        """Have these written that an earlier controller of the job may not have written."""
        known = {record.id for record in self._read}
        self.add(*(record for record in records if record.id not in known))

    def look(self) -> None:
        """Called now and then: read and write what is due; say what went wrong."""
        if self._problem != self._told:
            self._told = self._problem
            if self._problem:
                self._say(self._problem)
        every_s = _AGAIN_S if isinstance(self._place, Path) else _AGAIN_OBJECTS_S
        is_due = time.monotonic() - self._asked_s > every_s or (self._waiting and self._keeps and not self._problem)
        if is_due and (self._thread is None or not self._thread.is_alive()):
            self._begin()

    def close(self) -> None:
        """Write what waits, for some seconds at most."""
        until = time.monotonic() + _CLOSE_WAIT_S
        while self._waiting and self._keeps and time.monotonic() < until:
            if self._thread is None or not self._thread.is_alive():
                self._begin()
            if self._thread is not None:
                self._thread.join(max(0.0, until - time.monotonic()))
            if self._problem:
                break
        if self._thread is not None:
            self._thread.join(max(0.0, until - time.monotonic()))

    def _begin(self) -> None:
        self._asked_s = time.monotonic()
        self._thread = threading.Thread(target=self._exchange, name="cluster store", daemon=True)
        self._thread.start()

    def _exchange(self, *, writes: bool = True) -> None:
        with self._lock:
            batch = list(self._waiting)
        try:
            if self._store is None:
                self._store = ClusterStore(self._place)
            if batch and writes and self._keeps:
                self._store.add(batch)
            found = self._store.read()
            with self._lock:
                self._read, self._records = found.records, None
                written = {record.id for record in batch} if writes and self._keeps else set()
                self._waiting = [record for record in self._waiting if record.id not in written]
            if writes and self._keeps and not self._is_tidy:
                self._is_tidy = True
                self._store.tidy(time.time())
            self._problem = "; ".join(found.problems[:3])
        except (EvermeshError, OSError) as error:
            self._problem = str(error)
        self._is_known = True
