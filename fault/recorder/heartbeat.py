"""The heartbeat of a rank: how far its groups are by torch's own counters, ten times per second."""

import json
import threading
import time
from collections.abc import Callable, Mapping

from evermesh.fault.recorder import ring_format as form
from evermesh.fault.recorder.ring import Ring

_EVERY_S = 0.1
_CLOCKS_EVERY = 100
"""Heartbeats between two looks at the wall clock."""


class Heartbeat:
    """A thread that writes into the header of the ring until ``stop``; it needs the interpreter's lock for microseconds.

    ``index_of``: the index of a group by torch's name for it, None while it is not known.
    """

    def __init__(self, ring: Ring, index_of: Callable[[str], int | None]) -> None:
        self._ring, self._index_of = ring, index_of
        self._rows: dict[str, int] = {}
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="evermesh-heartbeat", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Return when it writes no more."""
        self._stopped.set()
        self._thread.join()

    def beat(self) -> None:
        """Write down how far every group is."""
        for name, status in _statuses().items():
            row = self._rows.get(name)
            if row is None:
                row = self._new_row(name)
            if row is not None:
                begun, over = (int(status.get(f"last_{what}_collective", -1)) for what in ("enqueued", "completed"))
                self._ring.words[row + 1] = max(0, begun)
                self._ring.words[row + 2] = max(0, over)
        self._ring.words[form.BEAT_AT] = time.monotonic_ns()

    def _new_row(self, name: str) -> int | None:
        index = self._index_of(name)
        if index is None or len(self._rows) >= form.NUM_PROGRESS_GROUPS:
            return None
        row = form.PROGRESS_OF_GROUPS_AT + len(self._rows) * form.WORDS_PER_GROUP
        self._ring.words[row] = index
        self._rows[name] = row
        return row

    def _run(self) -> None:
        beats = 0
        while not self._stopped.wait(_EVERY_S):
            beats += 1
            if beats % _CLOCKS_EVERY == 0:
                self._ring.note_clocks()
            self.beat()


def _statuses() -> Mapping[str, Mapping[str, str]]:
    """By the name of the group; without entries it takes microseconds."""
    from torch._C import _distributed_c10d

    dump = getattr(_distributed_c10d, "_dump_fr_trace_json", None)
    if dump is None:
        return {}
    found = json.loads(dump(False, False)).get("pg_status", {})
    return found if isinstance(found, dict) else {}
