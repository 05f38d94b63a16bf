"""Reading one ring again and again: only what is new is copied."""

import mmap
import os
import time
from pathlib import Path
from typing import Self

import numpy as np

from evermesh.fault.process_state import ProcessState
from evermesh.fault.recorder import ring_format as form
from evermesh.fault.recorder.errors import RingUnreadable
from evermesh.fault.recorder.names import Names, parse_names
from evermesh.fault.recorder.reader import process_at, read_records, trace_of
from evermesh.fault.recorder.record import RECORD
from evermesh.fault.recorder.trace import RankTrace


class RingFollower:
    """The ring in ``path``, mapped until ``close``, also when its file has been removed. A context manager.

    Raises:
        RingUnreadable: it is none, is being made, or is of another version.
        OSError: it is gone.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != form.RING_BYTES:
                raise RingUnreadable(
                    f"{path} has {size:,} bytes, a ring {form.RING_BYTES:,}: it is being made, or none."
                )
            self._memory = mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ)
        self._head = np.frombuffer(self._memory, "<u8", form.HEADER_BYTES // form.WORD_BYTES)
        self._slots = np.frombuffer(self._memory, RECORD, form.NUM_SLOTS, form.RECORDS_AT)
        self._names_used = -1
        self._names = Names()
        if int(self._head[form.MAGIC_AT]) != form.MAGIC or int(self._head[form.VERSION_AT]) != form.VERSION:
            self.close()
            raise RingUnreadable(f"{path} is no ring of version {form.VERSION}, or is being made.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file."""
        self._head = self._slots = np.empty(0, np.uint64)
        self._memory.close()

    def process(self) -> ProcessState | None:
        """What the process that writes it does now; None: it has ended."""
        return process_at(int(self._head[form.PID_AT]), int(self._head[form.STARTED_AT]))

    def read(self, since: int = 1) -> RankTrace:
        """What the ring holds now of the records from sequence ``since`` on; the same as ``read_ring`` would, but for older
        ones."""
        read_ns = time.monotonic_ns()
        records = self._records(since)
        head = self._head.copy()
        used = int(head[form.NAMES_USED_AT])
        if used != self._names_used:  # they are appended, and never changed
            end = form.HEADER_BYTES + min(used, form.NAMES_BYTES)
            self._names, self._names_used = parse_names(self._memory[form.HEADER_BYTES : end]), used
        return trace_of(head, records, self._names, read_ns)

    def newest(self, count: int) -> RankTrace:
        """The last ``count`` records."""
        return self.read(int(self._slots["sequence"].max()) - count + 1)

    def _records(self, since: int) -> np.ndarray:
        last = int(self._slots["sequence"].max())
        first = max(since, last - form.NUM_SLOTS + 1, 1)
        if last < first:
            return np.empty(0, RECORD)
        if last - first + 1 > form.NUM_SLOTS // 2:
            records = read_records(self._slots, form.NUM_SLOTS)
            return records[int((records["sequence"] < first).sum()) :]
        return _whole(self._slots, first, last)


def _whole(slots: np.ndarray, first: int, last: int) -> np.ndarray:
    """Records ``first`` to ``last`` up to the first that is being written: it is read the next time."""
    places = np.arange(first - 1, last) % len(slots)
    copied = slots[places]
    same = (copied["sequence"] == np.arange(first, last + 1, dtype=np.uint64)) & (
        slots["sequence"][places] == copied["sequence"]
    )
    found: np.ndarray = copied[: len(copied) if same.all() else int(same.argmin())]
    return found
