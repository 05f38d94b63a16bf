"""Snapshots of a training job: every rank copies its part into memory of its keeper, and all agree when they have it.

step k        copy ──► "seal" (one message)
steps k+1..   keeper: digests, index, SEALED      the rank looks at the slot, which is memory, and votes in the step's sum
step n        the votes say that nobody waits: COMMITTED, and the slot with the snapshot before it is free
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from evermesh.checkpoint.agreement import RankFailure, together
from evermesh.checkpoint.shard_map import ShardMap
from evermesh.checkpoint.tensors import Held
from evermesh.fault.errors import KeeperRefused
from evermesh.fault.snapshot.copies import CopyPlan, SlotCopies
from evermesh.fault.snapshot.keeper.client import KeeperClient, KeeperLost
from evermesh.fault.snapshot.keeper.layouts import Group, write_layout
from evermesh.fault.snapshot.keeper.slots import NUM_SLOTS
from evermesh.fault.snapshot.remote import Keepers
from evermesh.parallelism.collectives import Communicator

_START_S = 10.0
"""How long a keeper may take to listen and to make room."""
_RANKS = 1 << 20
"""More than any job has."""
_WAITS, _LOST, _DUE = 1.0, float(_RANKS), float(_RANKS**2)
"""What a vote is made of: this rank waits for its keeper; its part is lost; rank 0 wants a snapshot behind this step. The
sum holds the three counts, which float64 can for 8192 lost ranks; of more, that there are some."""
Outcome = Literal["committed", "lost"]


@dataclass(frozen=True, slots=True)
class Keeping:
    """Where the ranks of a node leave their snapshots."""

    area: Path
    generation: int
    """Of this attempt. A keeper takes nothing from one before it."""
    newest: int | None = None
    """Step of the newest checkpoint in storage; None: there is none. What is older in memory is left there."""
    failures: int = 0
    """Attempts that the controller has seen fail, since it was started."""
    running_s: float = 0.0
    """For which it has watched, seconds."""
    keepers: Keepers | None = None
    """Of all nodes, if their memory can be read; None: there is only this node's."""


@dataclass(slots=True)
class Counts:
    """What became of the snapshots of an attempt, equal on all ranks but for the time."""

    committed: int = 0
    skipped: int = 0
    """Not begun, because the one before was not complete on all ranks."""
    lost: int = 0
    """Begun, and given up because a rank lost its keeper."""
    stop_s: float = 0.0
    """For which this rank stood still."""


class Snapshots:
    """The snapshots of one rank. Collective, as ``BackgroundSaver`` is; ``tensors`` are live.

    Args:
        communicator: all ranks of the job, which know their nodes.
        restored: slot of this rank with the snapshot that the state was restored from: all ranks hold that one.

    Raises:
        KeeperRefused: on every rank, if a keeper cannot be reached or has no room.
    """

    def __init__(
        self,
        keeping: Keeping,
        shard_map: ShardMap,
        tensors: Held,
        communicator: Communicator,
        restored: int | None = None,
    ) -> None:
        self._keeping, self._tensors = keeping, tensors
        self.counts = Counts()
        mates = tuple(ranks_of_node(communicator))
        self._plan = CopyPlan.of(shard_map, communicator.rank, mates)
        self._group = Group(keeping.generation, self._plan.digest, mates, communicator.size)
        self._map = shard_map.to_json() if communicator.rank == mates[0] else None
        self._client: KeeperClient | None = None
        self._copies: SlotCopies | None = None
        self._committed: int | None = restored
        """The slot that must stay as it is."""
        self._pending: int | None = None
        """The step whose snapshot not all ranks have yet."""
        self._is_lost = False
        """Whether the part of this rank of that one is."""
        try:
            together(communicator, self._begin)
        except RankFailure as failure:
            self.close()
            raise KeeperRefused(failure.rank, failure.cause) from failure

    @property
    def is_pending(self) -> bool:
        """Whether one is under way: until that is over none is begun."""
        return self._pending is not None

    def vote(self, *, is_due: bool) -> float:
        """What this rank adds to the sum of a step; ``is_due`` counts on rank 0. Not collective, waits for nothing."""
        return self._own_vote() + (_DUE if is_due and self._plan.rank == 0 else 0.0)

    def count(self, votes: float) -> tuple[Outcome | None, bool]:
        """From the sum over all ranks: what became of the snapshot under way, and whether one is due. The same everywhere."""
        rest, waiting = divmod(int(votes), _RANKS)
        is_due, lost = divmod(rest, _RANKS)
        outcome: Outcome | None = None
        if self._pending is not None and (lost or not waiting):
            outcome = "lost" if lost else "committed"
            if outcome == "committed":
                self._commit()
            else:
                self.counts.lost += 1
            self._pending, self._is_lost = None, False
        return outcome, bool(is_due)

    def begin(self, step: int, objects: Mapping[str, JsonValue], description: Mapping[str, JsonValue]) -> bool:
        """Copy the state as it is now, unless a snapshot is under way; whether it did. All ranks call it, and do the same.

        It returns after the copy; what is wrong with the keeper shows in a later vote.
        """
        if self._pending is not None:
            self.counts.skipped += 1
            return False
        began_s = time.monotonic()
        self._pending = step
        try:
            self._copy(step, objects, description)
        except OSError:  # the keeper has gone, or has lost its memory: the next one is tried with another
            self._lose()
        self.counts.stop_s += time.monotonic() - began_s
        return True

    def give_up(self) -> None:
        """Wait for the part of this rank no longer: the snapshot under way is lost when that is counted. Not collective."""
        self._is_lost = True

    def close(self) -> None:
        """Let go of the memory and of the keeper; what is there stays there."""
        self._let_go()

    def _begin(self) -> None:
        self._connect(_START_S)
        assert self._client is not None
        self._write_layout()
        answer = self._client.ask("reserve", _START_S, **self._plan.reservation(self._keeping.generation))
        if not answer["ok"]:
            raise OSError(answer["fact"])
        self._copies = SlotCopies(self._keeping.area, self._plan, self._tensors)

    def _connect(self, wait_s: float) -> None:
        self._client = KeeperClient(self._keeping.area, wait_s)

    def _copy(self, step: int, objects: Mapping[str, JsonValue], description: Mapping[str, JsonValue]) -> None:
        generation = self._keeping.generation
        if self._client is None:
            self._reconnect()
        assert self._client is not None
        assert self._copies is not None
        slot = self._free_slot
        self._copies.copy(slot, step, objects, description)
        self._client.tell("seal", generation=generation, rank=self._plan.rank, slot=slot, step=step)

    def _reconnect(self) -> None:
        """To a keeper that has taken the place of another. It has found the memory, or is told to make it anew, which is
        not waited for: until that is there this raises ``OSError``."""
        self._connect(0.0)
        assert self._client is not None
        self._write_layout()
        self._client.tell("reserve", **self._plan.reservation(self._keeping.generation))
        if self._copies is not None and not self._copies.are_there:
            self._copies.close()
            self._copies, self._committed = None, None
        if self._copies is None:
            self._copies = SlotCopies(self._keeping.area, self._plan, self._tensors)

    def _write_layout(self) -> None:
        """Say, once on a node, what ranks of other layouts must know; it is there before any snapshot."""
        if self._map is not None:
            write_layout(self._keeping.area, self._group, self._map)

    @property
    def _free_slot(self) -> int:
        return 0 if self._committed is None else (self._committed + 1) % NUM_SLOTS

    def _own_vote(self) -> float:
        """Nothing where nothing is under way, or this rank has its part."""
        if self._pending is None:
            return 0.0
        if not self._is_lost and self._copies is not None:
            state = self._copies.state(self._free_slot, self._keeping.generation, self._pending)
            if state in ("sealed", "protected"):
                return 0.0
            self._look_at_keeper()
            if state == "protecting" and self._client is None:  # it is whole; nobody protects it any more
                self._is_lost = False
                return 0.0
            if not self._is_lost and state in ("writing", "protecting", None):
                return _WAITS
        return _LOST

    def _look_at_keeper(self) -> None:
        try:
            assert self._client is not None
            refused = [answer["fact"] for answer in self._client.answers() if not answer["ok"]]
        except (KeeperLost, AssertionError):
            self._lose()
            return
        if refused:
            self._lose()

    def _lose(self) -> None:
        """Give up the keeper; the next snapshot looks for another."""
        self._is_lost = True
        if self._client is not None:
            self._client.close()
            self._client = None

    def _commit(self) -> None:
        assert self._copies is not None
        self._committed = self._free_slot
        self._copies.commit(self._committed)
        self.counts.committed += 1

    def _let_go(self) -> None:
        if self._copies is not None:
            self._copies.close()
            self._copies = None
        if self._client is not None:
            self._client.close()
            self._client = None


def ranks_of_node(communicator: Communicator) -> Sequence[int]:
    """The ranks that share the memory of this one's node."""
    own = communicator.nodes[communicator.rank]
    return [rank for rank, node in enumerate(communicator.nodes) if node == own]
