"""Looks again and again, slowly, whether snapshots are still what was sealed."""

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from evermesh.fault.snapshot.keeper.sealing import rotten_chunks
from evermesh.fault.snapshot.keeper.slots import USABLE, Header, SlotFiles, held_by, ranks_in

_BYTES_PER_S = 64 << 20
_PAUSE_S = 5.0


class Scrubber:
    """Reads every sealed slot of ``area`` at a bounded rate and marks what has rotted: nobody restores from it then.

    Whoever holds ``repairing`` makes slots whole meanwhile: what is found then is left to the next look.
    """

    def __init__(self, area: Path, repairing: threading.Lock, bytes_per_s: float = _BYTES_PER_S) -> None:
        self._area, self._repairing, self._bytes_per_s = area, repairing, bytes_per_s
        self.rotten: list[str] = []
        """What was found, in words."""

    def start(self) -> None:
        """Look until this process ends."""
        threading.Thread(target=self._look_forever, daemon=True).start()

    def look(self, pace: Callable[[int], None] | None) -> None:
        """Look at everything once; ``pace`` is called with the bytes that were read."""
        for rank in ranks_in(self._area):
            for held in held_by(self._area, rank):
                files = SlotFiles.of(self._area, rank, held.number)
                try:
                    wrong = rotten_chunks(files, pace or (lambda _: None))
                    if wrong:
                        self._mark(files, f"rank {rank}, step {held.record.step}: MiB {wrong}")
                except (OSError, ValueError, LookupError):  # released, or written to meanwhile
                    continue

    def _mark(self, files: SlotFiles, text: str) -> None:
        if not self._repairing.acquire(blocking=False):
            return
        try:
            self._mark_if_still_rotten(files, text)
        finally:
            self._repairing.release()

    def _mark_if_still_rotten(self, files: SlotFiles, text: str) -> None:
        header = Header(files.header)
        try:
            before = header.record
            # what was overwritten while it was read is no rot; the rank says that it writes before it does
            if before is None or not rotten_chunks(files, lambda _: None):
                return
            if header.state in USABLE and header.record == before:
                header.state = "damaged"
                self.rotten.append(text)
                print(f"memory of a snapshot has changed: {text}", file=sys.stderr, flush=True)
        finally:
            header.close()

    def _look_forever(self) -> None:
        while True:
            time.sleep(_PAUSE_S)
            self.look(lambda num_bytes: time.sleep(num_bytes / self._bytes_per_s))
