"""The two slots of a rank as the rank itself sees them: it copies into the one that nobody needs."""

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from evermesh.checkpoint.background.copying import ArenaCopy
from evermesh.checkpoint.committing import data_name
from evermesh.checkpoint.encoding import extents_in_order
from evermesh.checkpoint.file_plan import PlannedPart, placed_part, planned_parts
from evermesh.checkpoint.format import safetensors_header
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.tensors import Held
from evermesh.fault.snapshot.keeper.slots import NUM_SLOTS, Header, SlotFiles, State


@dataclass(frozen=True)
class CopyPlan:
    """What a rank copies: what the write plan gives it among the ranks of its node, as one file of a checkpoint."""

    rank: int
    digest: str
    """Of the shard map."""
    head: bytes
    parts: Sequence[PlannedPart]

    @classmethod
    def of(cls, shard_map: ShardMap, rank: int, node_ranks: Sequence[int]) -> "CopyPlan":
        """The plan of ``rank`` on the node with ``node_ranks``; computed by the rank alone."""
        parts = planned_parts(shard_map, rank, within=node_ranks)
        return cls(rank, shard_map.digest(), safetensors_header([one.entry for one in parts]), parts)

    @property
    def tensor_bytes(self) -> int:
        return sum(one.entry.num_bytes for one in self.parts)

    @property
    def data_bytes(self) -> int:
        """Of the file; 0: the rank copies nothing, and has none."""
        return len(self.head) + self.tensor_bytes if self.parts else 0

    def reservation(self, generation: int) -> dict[str, Any]:
        """What a keeper must know of it."""
        return {
            "generation": generation,
            "rank": self.rank,
            "shard_map": self.digest,
            "data_bytes": self.data_bytes,
            "tensor_bytes": self.tensor_bytes,
            "extents": extents_in_order(data_name(self.rank), len(self.head), map(placed_part, self.parts)),
        }


class SlotCopies:
    """The slots of a rank in ``area``, mapped with all their pages. What they hold stays until it is written over.

    Raises:
        OSError: they are not there.
    """

    def __init__(self, area: Path, plan: CopyPlan, tensors: Held) -> None:
        self._plan = plan
        self._files = [SlotFiles.of(area, plan.rank, number) for number in range(NUM_SLOTS)]
        self._headers = [Header(files.header) for files in self._files]
        self._inodes = self._found()
        files_with_data = self._files if plan.data_bytes else []
        self._memories = [_mapped(files.data, plan.data_bytes) for files in files_with_data]
        self._copies = [ArenaCopy(plan.parts, tensors, memory, len(plan.head)) for memory in self._memories]

    @property
    def are_there(self) -> bool:
        """Whether the slots in the area are those that are mapped here: others have taken their place if a keeper died
        and its memory was swept."""
        return self._inodes == self._found()

    def state(self, number: int, generation: int, step: int) -> State | None:
        """What the slot says; None if it holds something else than that snapshot. Takes no system call."""
        header = self._headers[number]
        state, record = header.state, header.record
        if state == "writing":
            return state
        is_it = record is not None and (record.generation, record.step) == (generation, step)
        return state if is_it else None

    def copy(
        self, number: int, step: int, objects: Mapping[str, JsonValue], description: Mapping[str, JsonValue]
    ) -> None:
        """Copy the tensors as they are now. Killed inside, the slot says that it is being written."""
        self._headers[number].begin(step)
        said = json.dumps({"objects": objects, "description": description}, separators=(",", ":"))
        self._files[number].objects.write_text(said)
        if self._copies:
            self._memories[number][: len(self._plan.head)] = self._plan.head
            self._copies[number].run()

    def commit(self, number: int) -> None:
        """Note that all ranks hold their part."""
        self._headers[number].state = "committed"

    def close(self) -> None:
        """Let go of the memory, which stays."""
        for copy in self._copies:
            copy.close()
        for header in self._headers:
            header.close()

    def _found(self) -> list[int]:
        try:
            return [os.stat(files.header).st_ino for files in self._files]
        except OSError:
            return []


def _mapped(file: Path, num_bytes: int) -> mmap.mmap:
    descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size != num_bytes:
            raise OSError(f"{file} has {size:,} bytes, not {num_bytes:,}")
        return mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    finally:
        os.close(descriptor)
