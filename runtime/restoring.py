"""How an attempt goes on from memory: the ranks agree on a snapshot, and each takes its part of it from whoever holds it."""

import json
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from evermesh import checkpoint
from evermesh.checkpoint.agreement import RankFailure, together
from evermesh.fault.snapshot.choosing import Version, common_versions
from evermesh.fault.snapshot.keeper.slots import NUM_SLOTS, held_by, ranks_in
from evermesh.fault.snapshot.reachable import Kept, Memories, from_json, to_json
from evermesh.fault.snapshot.snapshots import Keeping, ranks_of_node
from evermesh.fault.snapshot.source import slot_with, source_of_node, versions_of
from evermesh.parallelism.collectives import Communicator

if TYPE_CHECKING:
    from evermesh.runtime.trainer import Trainer

_CALL_SITE = "checkpoint"


class Restoring:
    """Takes the newest snapshot over that no checkpoint is newer than. Collective; used once."""

    def __init__(self, trainer: "Trainer", keeping: Keeping) -> None:
        self._trainer, self._keeping = trainer, keeping
        self._communicator = trainer.groups.host
        self.is_touched = False
        """Whether some of a snapshot was read that turned out to be damaged."""
        self.version: Version | None = None
        """The snapshot that was taken over."""
        self.is_elsewhere = False
        """Whether it was not in this layout in the memory of the ranks' own nodes."""
        self.began_s = 0.0
        """When its loading began, monotonic clock."""

    @property
    def slot(self) -> int | None:
        """The slot of this rank with its part of that snapshot, if it has one."""
        if self.version is None:
            return None
        return slot_with(self._keeping.area, self._communicator.rank, self.version)

    def run(self) -> bool:
        """Whether there was one. Otherwise the state is as it was, or ``is_touched``."""
        newest = -1 if self._keeping.newest is None else self._keeping.newest
        with Memories(self._keeping.area, self._keeping.keepers, self._communicator.rank) as memories:
            for found in self._candidates(memories):
                version = found.version
                if version.step < newest:
                    continue
                try:
                    self._take(version, found.source, memories)
                except RankFailure as failure:
                    self.is_touched = True
                    text = f"the snapshot of step {version.step} cannot be used: {failure}"
                    self._trainer.reporter.log("snapshot damaged", text, step=version.step, rank=failure.rank)
                    continue
                self.version, self.is_elsewhere = version, found.is_elsewhere
                return True
        return False

    def _candidates(self, memories: Memories) -> "Iterator[_Candidate]":
        """Each once, the best first. What every rank finds in this layout in the memory of its own node needs nobody else;
        everybody's memory is looked at where there is none, or some node has seen a later attempt."""
        own = _own_versions(self._keeping, self._trainer.shards.digest(), self._communicator)
        here = [_Candidate(version, self._source_here(version), is_elsewhere=False) for version in own.common]
        is_newest = bool(own.common) and own.common[0].generation >= own.newest_generation
        tried = set(own.common) if is_newest else set()
        yield from here if is_newest else ()
        for found in self._everywhere(memories):
            if found.version not in tried:
                tried.add(found.version)
                yield found
        yield from (one for one in here if one.version not in tried)

    def _source_here(self, version: Version) -> Callable[[], checkpoint.Source]:
        trainer, mates = self._trainer, ranks_of_node(self._communicator)
        return lambda: source_of_node(self._keeping.area, mates, version, trainer.shards, trainer.workers)

    def _everywhere(self, memories: Memories) -> "list[_Candidate]":
        """What is complete in the memory of all nodes together; rank 0 asks, and tells the others."""
        communicator = self._communicator
        found = together(communicator, lambda: self._looked(memories) if communicator.rank == 0 else None)
        told = communicator.broadcast_bytes(found, 0, _CALL_SITE)
        versions, _, rest = told.partition(b"\n")
        kept = from_json(rest)
        return [
            _Candidate(version, self._source_of(memories, kept, version), is_elsewhere=True)
            for version in (Version(*values) for values in json.loads(versions))
        ]

    def _looked(self, memories: Memories) -> bytes:
        """Of rank 0: the complete snapshots, and what keepers hold."""
        kept, missing = memories.look()
        if len(set(self._communicator.nodes)) > 1:
            kept = [one for one in kept if one.address is not None]
        if missing and any(one.parts for one in kept):
            self._trainer.reporter.log("memory", f"not all keepers can be reached: {'; '.join(missing)}")
        return json.dumps(memories.complete(kept)).encode() + b"\n" + to_json(kept)

    @staticmethod
    def _source_of(memories: Memories, kept: list[Kept], version: Version) -> Callable[[], checkpoint.Source]:
        return lambda: memories.source(kept, version)

    def _take(self, version: Version, source: Callable[[], checkpoint.Source], memories: Memories) -> None:
        """Raises ``RankFailure`` on all ranks if any cannot read its part."""
        trainer, before = self._trainer, memories.bytes_received
        self.began_s = time.monotonic()
        if trainer.faults is not None:
            trainer.faults.reach("restore", version.step)
        loaded = together(self._communicator, lambda: trainer.state.load_snapshot(source()))
        trainer.state.take_objects(loaded)
        seconds = time.monotonic() - self.began_s
        received = memories.bytes_received - before
        amounts = torch.tensor([loaded.bytes_read, received], dtype=torch.int64)
        self._communicator.all_reduce(amounts, _CALL_SITE)
        bytes_read, bytes_received = amounts.tolist()
        text = f"from memory, step {version.step} of attempt {version.generation}, on {trainer.workers} workers"
        if bytes_received:
            text += f", {bytes_received:,} bytes of it from other nodes"
        trainer.reporter.log(
            "resumed",
            text,
            step=version.step,
            load_s=seconds,
            source="memory",
            bytes_read=bytes_read,
            bytes_received=bytes_received,
        )


class _Candidate(NamedTuple):
    """A snapshot, and how this rank gets at it."""

    version: Version
    source: Callable[[], checkpoint.Source]
    is_elsewhere: bool


class _Own(NamedTuple):
    """What ranks find in the memory of their own nodes, the same on all of them."""

    common: list[Version]
    """Of which every rank holds its part, in the layout of this attempt; newest first."""
    newest_generation: int
    """Of all that any node holds, in whatever layout; -1: nothing."""


def _own_versions(keeping: Keeping, digest: str, communicator: Communicator) -> _Own:
    """Collective. Reads headers in memory only."""
    own = [version for version in versions_of(keeping.area, communicator.rank) if version.shard_map == digest]
    seen = [held.record.generation for rank in ranks_in(keeping.area) for held in held_by(keeping.area, rank)]
    rows = [(version.generation, version.step) for version in own]
    padded = [*rows, *[(-1, -1)] * (NUM_SLOTS - len(rows)), (max(seen, default=-1), -1)]
    told = torch.tensor(padded, dtype=torch.int64).flatten()
    gathered = torch.empty(communicator.size * len(told), dtype=torch.int64)
    communicator.all_gather(gathered, told, _CALL_SITE)
    of_ranks = gathered.view(communicator.size, NUM_SLOTS + 1, 2).tolist()
    held = {
        rank: [Version(generation, step, digest) for generation, step in of_rank[:NUM_SLOTS] if generation >= 0]
        for rank, of_rank in enumerate(of_ranks)
    }
    newest = max(of_rank[NUM_SLOTS][0] for of_rank in of_ranks)
    return _Own(common_versions(held, communicator.size), newest)
