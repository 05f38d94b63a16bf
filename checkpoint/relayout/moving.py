"""Moving tensors between the ranks of a running job, from the regions that they hold to those that they are to hold."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from evermesh.checkpoint.agreement import RankFailure, together
from evermesh.checkpoint.errors import ShardMapInvalid
from evermesh.checkpoint.regions import IntArray, Runs
from evermesh.checkpoint.relayout.plan import Parcel, Piece, Plan, Round, make_plan
from evermesh.checkpoint.relayout.strided import copy_runs
from evermesh.checkpoint.shard_map import Region, ShardMap
from evermesh.checkpoint.tensors import Held, local_tensors
from evermesh.parallelism.collectives import Communicator

if TYPE_CHECKING:
    import torch.distributed as dist

CALL_SITE = "relayout"
MOST_STAGED_BYTES = 64 << 20
_HOST = torch.device("cpu")
_IN_FLIGHT = 2
"""Rounds under way at a time: one is packed while the other travels."""
_LEAST_STAGED_BYTES = 64


@dataclass(frozen=True, slots=True)
class Holding:
    """A shard map, and what this rank has of it."""

    shard_map: ShardMap
    tensors: Held
    """Of the target contiguous, and apart from those of the source."""


@dataclass(frozen=True, slots=True)
class Carrier:
    """What tensors travel by.

    Args:
        communicator: the ranks of both maps, on a backend that takes tensors on ``device``.
        host: the same ranks, on a backend that takes tensors on the host; None: ``communicator`` does.
        device: where the tensors are.
        most_staged_bytes: of the copies that a rank sends or receives at a time, together.
    """

    communicator: Communicator
    host: Communicator | None = None
    device: torch.device = _HOST
    most_staged_bytes: int = MOST_STAGED_BYTES


class Moved(NamedTuple):
    """What a move did; the same on every rank, but for the last."""

    sent_bytes: tuple[int, ...]
    """By rank."""
    received_bytes: tuple[int, ...]
    """By rank: what it did not hold before."""
    copied_bytes: int
    """What this rank held already."""

    @property
    def total_bytes(self) -> int:
        """That travelled between ranks."""
        return sum(self.sent_bytes)


def relayout(
    source: Holding, target: Holding, carrier: Carrier, *, release: Callable[[str], object] | None = None
) -> Moved:
    """Fill what ``target`` holds from what ``source`` holds, bit for bit; padding in the target stays as it is.

    Collective: every rank of the communicator calls it with the same maps, whose ranks are those of the communicator; a
    rank may hold nothing in either map. Returns when the tensors of this rank are complete. Every rank receives the
    elements that it does not hold already, once, and nothing else. Extra memory is ``most_staged_bytes``, and the runs of
    what this rank moves. ``release`` is called with the name of each tensor of the source as soon as nothing more of it is
    needed; where it removes it from ``source.tensors`` and nobody else keeps it, its memory is free.

    Raises:
        ShardMapInvalid: on every rank, if the maps do not hold the same tensors, are not the same on all ranks, or do not
            fit the tensors of some rank. Nothing was moved.
    """
    communicator = carrier.communicator
    agreeing = carrier.host or communicator
    try:
        digest = together(agreeing, lambda: _checked(source, target, carrier))
        together(agreeing, lambda: _check_digest(digest, agreeing.broadcast_bytes(digest.encode(), 0, CALL_SITE)))
    except RankFailure as failure:
        raise ShardMapInvalid(f"nothing was moved, {failure}") from failure
    room_bytes = carrier.most_staged_bytes // _IN_FLIGHT
    plan = make_plan(source.shard_map, target.shard_map, communicator.rank, communicator.nodes, room_bytes)
    _Move(source, target, carrier, plan, release).run()
    copied = sum(piece.runs.num_elements * piece.item for piece in plan.copies)
    return Moved(plan.sent_bytes, plan.received_bytes, copied)


def move_part(source: Holding, target: Holding, carrier: Carrier, release: Callable[[str], object]) -> None:
    """``relayout`` of what ``source`` holds, which may be a part of the tensors only; the rest of the target stays as it is.

    Collective. Both are known to fit: nothing is checked.
    """
    communicator = carrier.communicator
    room_bytes = carrier.most_staged_bytes // _IN_FLIGHT
    plan = make_plan(source.shard_map, target.shard_map, communicator.rank, communicator.nodes, room_bytes)
    _Move(source, target, carrier, plan, release).run()


class _Move:
    """One rank's part of a move."""

    def __init__(
        self,
        source: Holding,
        target: Holding,
        carrier: Carrier,
        plan: Plan,
        release: Callable[[str], object] | None,
    ) -> None:
        self._communicator, self._device, self._plan = carrier.communicator, carrier.device, plan
        rank = self._communicator.rank
        self._held, self._source_at = source.tensors, _places(source.shard_map, rank)
        self._wanted, self._target_at = target.tensors, _places(target.shard_map, rank)
        sent = (parcel for part in plan.rounds for parcels in part.sends.values() for parcel in parcels)
        self._needed = Counter([piece.name for piece in plan.copies]) + Counter(parcel.piece.name for parcel in sent)
        """By tensor: how often something of what is held is still to be taken."""
        self._release = release or (lambda name: None)

    @torch.no_grad()
    def run(self) -> None:
        """Return when everything is where it is wanted."""
        for name in [name for name in self._held if not self._needed[name]]:
            self._release(name)
        under_way: deque[_Travelling] = deque()
        rounds = iter(self._plan.rounds)
        if first := next(rounds, None):
            under_way.append(self._send_off(first))
        for piece in self._plan.copies:  # while the first messages travel
            copy_runs(self._source(piece), self._target(piece), piece.runs)
            self._take_note(piece)
        for part in rounds:
            under_way.append(self._send_off(part))
            if len(under_way) == _IN_FLIGHT:
                self._unpack(under_way.popleft())
        while under_way:
            self._unpack(under_way.popleft())

    def _send_off(self, part: Round) -> "_Travelling":
        sends = [(self._pack(parcels), peer) for peer, parcels in sorted(part.sends.items())]
        receives = [(self._message(parcels), peer) for peer, parcels in sorted(part.receives.items())]
        works = self._communicator.exchange(sends, receives, CALL_SITE)
        return _Travelling(part, sends, receives, works)

    def _unpack(self, travelling: "_Travelling") -> None:
        for work in travelling.works:
            work.wait()
        for message, peer in travelling.receives:
            for parcel, content in _contents(message, travelling.part.receives[peer]):
                target, runs = self._target(parcel.piece), parcel.runs()
                copy_runs(content.view(target.dtype), target, Runs(_along(runs), runs.destination, runs.length))

    def _pack(self, parcels: Sequence[Parcel]) -> Tensor:
        message = self._message(parcels)
        for parcel, content in _contents(message, parcels):
            source, runs = self._source(parcel.piece), parcel.runs()
            copy_runs(source, content.view(source.dtype), Runs(runs.source, _along(runs), runs.length))
            self._take_note(parcel.piece)
        return message

    def _message(self, parcels: Iterable[Parcel]) -> Tensor:
        return torch.empty(sum(parcel.num_bytes for parcel in parcels), dtype=torch.uint8, device=self._device)

    def _source(self, piece: Piece) -> Tensor:
        return _storage(self._held[piece.name], self._source_at[piece.name, piece.source]).reshape(-1)

    def _target(self, piece: Piece) -> Tensor:
        return _storage(self._wanted[piece.name], self._target_at[piece.name, piece.target]).view(-1)

    def _take_note(self, piece: Piece) -> None:
        """What was wanted of a held region has been taken."""
        self._needed[piece.name] -= 1
        if not self._needed[piece.name]:
            self._release(piece.name)


class _Travelling(NamedTuple):
    """A round under way; the messages stay until it has arrived."""

    part: Round
    sends: list[tuple[Tensor, int]]
    receives: list[tuple[Tensor, int]]
    works: "list[dist.Work]"


def _contents(message: Tensor, parcels: Iterable[Parcel]) -> Iterable[tuple[Parcel, Tensor]]:
    """Each parcel with its bytes of the message: those of larger elements first, so that all are aligned."""
    start = 0
    for parcel in sorted(parcels, key=lambda parcel: -parcel.piece.item):
        yield parcel, message[start : start + parcel.num_bytes]
        start += parcel.num_bytes


def _along(runs: Runs) -> IntArray:
    """Where each run begins if they lie end to end."""
    starts: IntArray = runs.length.cumsum() - runs.length
    return starts


def _places(shard_map: ShardMap, rank: int) -> dict[tuple[str, int], int]:
    """By tensor and shard: which of the regions that ``rank`` holds it is."""
    places = {}
    for name, tensor in shard_map.tensors.items():
        held = [index for index, shard in enumerate(tensor.shards) if rank in shard.ranks]
        places.update({(name, index): place for place, index in enumerate(held)})
    return places


def _storage(tensors: Tensor | Sequence[Tensor], place: int) -> Tensor:
    return tensors.detach() if isinstance(tensors, Tensor) else tensors[place].detach()


def _checked(source: Holding, target: Holding, carrier: Carrier) -> str:
    """A digest of both maps, which fit each other and the tensors of this rank."""
    ranks, rank = carrier.communicator.size, carrier.communicator.rank
    if carrier.most_staged_bytes < _LEAST_STAGED_BYTES:
        raise ShardMapInvalid(
            f"{carrier.most_staged_bytes} bytes are no room for messages. Allow at least {_LEAST_STAGED_BYTES}."
        )
    problems = list(_differences(source.shard_map, target.shard_map))
    if problems:
        raise ShardMapInvalid(f"the two maps differ: {'; '.join(problems)}. Build both from the same state.")
    for side, holding in (("source", source), ("target", target)):
        holding.shard_map.check()
        highest = max((r for t in holding.shard_map.tensors.values() for s in t.shards for r in s.ranks), default=0)
        if highest >= ranks:
            raise ShardMapInvalid(f"the {side} map names rank {highest}, but {ranks} ranks move.")
        pairs = local_tensors(holding.shard_map, rank, holding.tensors)
        _check_places(side, pairs, carrier.device)
    return f"{source.shard_map.digest()} {target.shard_map.digest()}"


def _differences(source: ShardMap, target: ShardMap) -> Iterable[str]:
    for name in sorted(source.tensors.keys() ^ target.tensors.keys()):
        yield f"{name} is in one of them only"
    for name in sorted(source.tensors.keys() & target.tensors.keys()):
        here, there = ((tensor.dtype, list(tensor.shape)) for tensor in (source.tensors[name], target.tensors[name]))
        if here != there:
            yield f"{name} is {here[0]} {here[1]} in the source, {there[0]} {there[1]} in the target"


def _check_places(side: str, pairs: dict[str, list[tuple[Region, Tensor]]], device: torch.device) -> None:
    for name, regions in pairs.items():
        for region, tensor in regions:
            if tensor.device.type != device.type:
                raise ShardMapInvalid(f"{name}{region} of the {side} is on {tensor.device}, not on {device}.")
            if side == "target" and not tensor.is_contiguous():
                raise ShardMapInvalid(f"{name}{region} of the target is not contiguous. Give a contiguous tensor.")


def _check_digest(own: str, of_first: bytes) -> None:
    if own.encode() != of_first:
        raise ShardMapInvalid("its maps are not those of rank 0. Build them from the same inputs on all ranks.")
