"""The process that writes the checkpoints of one rank: ``python -m evermesh.checkpoint.background.writer DESCRIPTOR``.

It reads orders from standard input and answers on standard output (``orders``). All ranks meet in the temporary directory
of the step, which rank 0 makes and marks as ready, or in the folder of the attempt in an object store, where none is made.
Every rank writes its files and then its index, and when all indexes are there rank 0 writes the manifest and commits. No
collective is involved, so training goes on.

It ends when standard input does, that is with its trainer, however that ends; only a commit that has begun is finished,
with the removal of what it replaces.
It loads no torch and no numpy, so that it is there within a tenth of a second.
"""

import json
import mmap
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from evermesh.checkpoint import committing
from evermesh.checkpoint.background.data_files import DataFiles
from evermesh.checkpoint.background.orders import Answer, SaveOrder, WriterPlan, marker_name, temporary_names
from evermesh.checkpoint.committing import Attempt, index_name
from evermesh.checkpoint.encoding import IndexHead, index_payload, read_index_heads, sealed
from evermesh.checkpoint.files import LateFiles, write_durably
from evermesh.checkpoint.merging import merged_manifest, told_of
from evermesh.checkpoint.parity import Stripes, parts_of, protect
from evermesh.checkpoint.stores.places import Place

_FIRST_LOOK_S, _LAST_LOOK_S = 0.001, 0.05
_LAST_STORE_LOOK_S = 1.0
"""A look into an object store is a request that is paid for."""


class Writer:
    """Carries out the orders of one trainer.

    Args:
        arena: what the trainer copied; it does not change between an order and its last answer.
        tell: takes an answer as one line.
    """

    def __init__(self, plan: WriterPlan, arena: memoryview, tell: Callable[[bytes], None]) -> None:
        self.plan, self._tell = plan, tell
        self.files = DataFiles(plan, arena)
        self.directory = plan.place
        self.committing = threading.Lock()
        """Held while a checkpoint becomes visible and old ones go: a process that ends then would leave them half deleted."""

    def save(self, order: SaveOrder) -> None:
        """Write the files of this rank and, on rank 0, commit. What fails is told."""
        began_s = time.monotonic()

        def answer(kind: Any, **fields: Any) -> None:
            self._tell(Answer(kind, order.identity, time.monotonic() - began_s, **fields).to_json())

        try:
            if order.is_repeated and self._was_committed(order, answer):
                return
            self._begin(order)
            answer("written", bytes_written=self._write(order))
            if self.plan.rank == 0:
                heads = _heads(self._attempt(order).files, [index_name(rank) for rank in range(self.plan.world_size)])
                parity = self._parity(order, heads)
                with self.committing:
                    self._commit(order, heads, parity)
                    answer("committed", bytes_written=sum(head.told["bytes_written"] for head in heads))
                    committing.retain(self.directory, order.step, self.plan.retention)
        except Exception as error:  # noqa: BLE001  supervision boundary: the trainer raises it on all ranks
            number = error.errno if isinstance(error, OSError) else None
            answer("failed", cause=f"{type(error).__name__}: {error}", errno=number)

    def _was_committed(self, order: SaveOrder, answer: Callable[..., None]) -> bool:
        """Whether the writer before this one had made the checkpoint visible; the end of it is then made sure of."""
        attempt = self._attempt(order)
        if self.plan.rank != 0 or not committing.is_committed(attempt):
            return False
        with self.committing:
            committing.commit(attempt)
        answer("written")
        answer("committed")
        return True

    def _attempt(self, order: SaveOrder) -> Attempt:
        return Attempt(self.directory, order.step, order.identity)

    def _begin(self, order: SaveOrder) -> None:
        """Return when there is a folder for the files of this save, made by rank 0 where folders are made."""
        attempt, marker = self._attempt(order), marker_name(order.identity)
        if self.plan.rank == 0:
            committing.prepare(attempt)
            if attempt.is_renamed:
                write_durably(attempt.files / marker, [])
        elif attempt.is_renamed:
            _await(lambda: marker in temporary_names(attempt.files), _LAST_LOOK_S)

    def _write(self, order: SaveOrder) -> int:
        """The data files of this rank, then the index of them, then its share of the parity of others; returns the bytes of
        data files that were written."""
        attempt = self._attempt(order)
        files = self.files.write(attempt.files, attempt.path)
        bytes_written = sum(file.num_bytes for file in files if not file.linked)
        payload = index_payload(
            {file.name: (file.num_bytes, file.checksums) for file in files},
            self.files.extents(files),
            told_of(self.plan.digest, self.plan.offsets[-1], bytes_written),
        )
        committing.put_index(attempt, self.plan.rank, payload)
        if self._stripes is not None:
            assert isinstance(attempt.files, Path), "parity is for file systems"
            members = self._stripes.members(self._stripes.protected_by(self.plan.rank))
            heads = _heads(attempt.files, [index_name(rank) for rank in members])
            protect(attempt.files, self._stripes, self.plan.rank, dict(zip(members, heads, strict=True)))
        return bytes_written

    @property
    def _stripes(self) -> Stripes | None:
        return None if self.plan.parity is None else Stripes(self.plan.world_size, self.plan.parity)

    def _parity(self, order: SaveOrder, heads: list[IndexHead]) -> tuple[int, list[IndexHead]] | None:
        """The heads of the indexes of all parity, as soon as all is there. On rank 0."""
        stripes, by_rank = self._stripes, dict(enumerate(heads))
        if stripes is None:
            return None
        parts = [part for stripe in range(stripes.number) for part in parts_of(stripes, stripe, by_rank)]
        return stripes.width, _heads(self._attempt(order).files, [part.index_name for part in parts])

    def _commit(self, order: SaveOrder, heads: list[IndexHead], parity: tuple[int, list[IndexHead]] | None) -> None:
        assert self.plan.saved is not None, "rank 0 knows the map"
        values = {
            "step": order.step,
            "time_s": time.time(),
            "world_size": self.plan.world_size,
            "description": order.description,
            "objects": order.objects,
        }
        attempt = self._attempt(order)
        manifest = merged_manifest(self.plan.saved, heads, values, parity)
        with LateFiles() as late:
            committing.stage(attempt, sealed(manifest), late)
            late.sync()
        committing.commit(attempt, (marker_name(order.identity),))


def serve(orders: int, answers: int, arena: memoryview) -> None:
    """Carry out the orders that come through descriptor ``orders`` until it ends; the process ends then."""
    lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    writer: Writer | None = None

    def read() -> None:
        with open(orders, "rb") as stream:
            for line in stream:
                lines.put(json.loads(line))
        if writer is not None:
            writer.committing.acquire()
        os._exit(0)  # whatever is under way: what it has written is removed by the next save

    threading.Thread(target=read, daemon=True).start()
    while True:
        values = lines.get()
        if values["kind"] == "plan":
            writer = Writer(WriterPlan.from_values(values), arena, lambda line: _send(answers, line))
        else:
            assert writer is not None, "the first order is the plan"
            writer.save(SaveOrder.from_values(values))


def main(descriptor: int) -> None:
    """Write what the arena behind ``descriptor`` holds, whenever asked."""
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the trainer, which then waits for the last commit
        signal.signal(number, signal.SIG_IGN)
    memory = mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    serve(0, 1, memoryview(memory))


def _send(descriptor: int, line: bytes) -> None:
    with suppress(BrokenPipeError):  # the trainer has ended, and so will this process
        while line:
            line = line[os.write(descriptor, line) :]


def _heads(folder: Place, names: Sequence[str]) -> list[IndexHead]:
    """The heads of indexes, read as they come, as soon as all are there."""
    wanted, heads = set(names), dict[str, IndexHead]()

    def are_all_there() -> bool:
        new = [name for name in temporary_names(folder) if name in wanted and name not in heads]
        heads.update(zip(new, read_index_heads([folder / name for name in new]), strict=True))
        return len(heads) == len(wanted)

    _await(are_all_there, _LAST_LOOK_S if isinstance(folder, Path) else _LAST_STORE_LOOK_S)
    return [heads[name] for name in names]


def _await(condition: Callable[[], bool], last_look_s: float) -> None:
    """Return when it holds. Without a limit of its own: if another rank fails, this one's trainer ends this process."""
    look_s = _FIRST_LOOK_S
    while not condition():
        time.sleep(look_s)
        look_s = min(2 * look_s, last_look_s)


if __name__ == "__main__":
    main(int(sys.argv[1]))
