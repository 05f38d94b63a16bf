"""The one tap through which the project's own communication passes, and the record it emits.

Every collective and point-to-point message of the project is issued through :class:`Communicator`; whoever listens
(the byte ledger, the recorder of the fault room, a test) gets one :class:`CollectiveRecord` for each.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from evermesh.parallelism.links import Operation, Tier, tiers_from, wire_bytes

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

Phase = Literal["start-up", "data", "compile", "train", "probe", "evaluate", "checkpoint"]
Point = Phase | Literal["sum"]
"""A phase, or, in ``train``, where all ranks meet to sum gradients."""


class Moment:
    """Where a thread of the job stands. Communicators share one, so that their records agree; its owner moves it on."""

    def __init__(self, step: int = 0, phase: Phase = "start-up") -> None:
        self.step = step
        """The step under way, or the last one; 0 until this process begins one."""
        self._phase = phase
        self.watch: Callable[[Point], None] | None = None
        """Told of every point that is reached, so that others can see where this thread is."""

    @property
    def phase(self) -> Phase:
        return self._phase

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._phase = phase
        self.reach(phase)

    def begin_step(self, step: int) -> None:
        """Training of ``step`` starts."""
        self.step, self.phase = step, "train"

    def reach(self, point: Point) -> None:
        """This thread is at ``point`` now."""
        if self.watch is not None:
            self.watch(point)


class CollectiveRecord(NamedTuple):
    """One collective or message as its caller saw it. Serialised as a flat JSON object (``to_dict``/``from_dict``)."""

    group: str
    """Name of the process group."""
    sequence: int
    """Number of the operation in its group on this rank, from 0; an ``all_to_all`` has a record for every tier."""
    operation: Operation
    num_bytes: int
    """Payload: bytes of the local buffer."""
    dtype: str
    peers: tuple[int, ...]
    """Ranks on the other side: one for a message, empty when the whole group takes part."""
    call_site: str
    """What the caller was doing, such as ``ring forward`` or ``gradients``."""
    step: int
    phase: Phase
    enqueued_s: float
    """Host clock (monotonic, seconds) when the operation was issued; on a GPU not the time it ran."""
    axis: str
    """Mesh axis of the group."""
    tier: Tier
    """Tier of the link over which this rank sends (or, for ``receive``, is sent to)."""
    wire_bytes: int
    """Bytes that this rank sends, as ``evermesh.parallelism.links`` counts them."""

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values."""
        return self._asdict()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The record that ``to_dict`` described."""
        return cls(**{**values, "peers": tuple(values["peers"])})


Sink = Callable[[CollectiveRecord], None]
Announcer = Callable[["Communicator", str], None]

_announce: Announcer | None = None


def announce_to(announcer: Announcer | None) -> None:
    """Tell ``announcer`` the communicator and the call site of every operation of this process, on the thread that is about
    to issue it; None: nobody. What lies below torch, as the recorder of the fault room does, knows neither.
    """
    global _announce
    _announce = announcer


class Communicator:
    """A process group with a tap. With ``group=None`` it stands for a single process, and collectives do nothing.

    Args:
        group: the ranks that communicate.
        name: name of the group, the same on all its ranks.
        axis: mesh axis that it lies on; the name by default.
        nodes: index of the node of every rank of the group; by default all are on one node.
        moment: where the thread that uses it stands; by default one of its own.
    """

    def __init__(
        self,
        group: "dist.ProcessGroup | None" = None,
        *,
        name: str = "world",
        axis: str | None = None,
        nodes: tuple[int, ...] | None = None,
        moment: Moment | None = None,
    ) -> None:
        self.group, self.name, self.axis = group, name, axis or name
        self.rank: int = group.rank() if group is not None else 0
        self.size: int = group.size() if group is not None else 1
        self.nodes = nodes if nodes is not None else (0,) * self.size
        self.moment = moment if moment is not None else Moment()
        assert len(self.nodes) == self.size, f"{len(self.nodes)} nodes given for {self.size} ranks"
        self._tiers = tiers_from(self.rank, self.nodes)
        self._next = (self.rank + 1) % self.size
        self._numbers = itertools.count()
        self._sinks: list[Sink] = []

    @contextmanager
    def listen(self, sink: Sink) -> Iterator[None]:
        """Send a record of every operation to ``sink`` until the block ends."""
        self._sinks.append(sink)
        try:
            yield
        finally:
            self._sinks.remove(sink)

    def all_reduce(self, tensor: "torch.Tensor", call_site: str, *, maximum: bool = False) -> None:
        """Sum (or take the maximum of) ``tensor`` over the group, in place. Collective."""
        if self.group is None:
            return
        import torch.distributed as dist

        self._emit("all_reduce", tensor, call_site)
        dist.all_reduce(tensor, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM, group=self.group)

    def all_gather(self, output: "torch.Tensor", tensor: "torch.Tensor", call_site: str) -> None:
        """Concatenate ``tensor`` of every rank along dim 0 into ``output``. Collective; equal shapes."""
        if self.group is None:
            output.copy_(tensor.view_as(output))
            return
        import torch.distributed as dist

        self._emit("all_gather", tensor, call_site)
        # renamed in torch 2.13; the old name still works there, with a warning
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        gather(output, tensor, group=self.group)

    def start_all_gather(self, output: "torch.Tensor", tensor: "torch.Tensor", call_site: str) -> "dist.Work | None":
        """As ``all_gather``, but only begin it; both stay untouched until the handle is waited for. None: it is done."""
        if self.group is None:
            output.copy_(tensor.view_as(output))
            return None
        import torch.distributed as dist

        self._emit("all_gather", tensor, call_site)
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        return _started(gather(output, tensor, group=self.group, async_op=True))

    def reduce_scatter(self, output: "torch.Tensor", tensor: "torch.Tensor", call_site: str) -> None:
        """Sum ``tensor`` over the group and keep this rank's part, along dim 0, in ``output``. Collective; equal shapes."""
        if self.group is None:
            output.copy_(tensor.view_as(output))
            return
        import torch.distributed as dist

        self._emit("reduce_scatter", tensor, call_site)
        reduce = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        reduce(output, tensor, group=self.group)

    def start_reduce_scatter(
        self, output: "torch.Tensor", tensor: "torch.Tensor", call_site: str
    ) -> "dist.Work | None":
        """As ``reduce_scatter``, but only begin it; as ``start_all_gather``."""
        if self.group is None:
            output.copy_(tensor.view_as(output))
            return None
        import torch.distributed as dist

        self._emit("reduce_scatter", tensor, call_site)
        reduce = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        return _started(reduce(output, tensor, group=self.group, async_op=True))

    def all_to_all(
        self,
        output: "torch.Tensor",
        tensor: "torch.Tensor",
        call_site: str,
        *,
        sent_rows: Sequence[int],
        received_rows: Sequence[int],
    ) -> None:
        """Send ``sent_rows[r]`` rows of ``tensor`` to each rank r and put what they send, by rank, into ``output``.

        Collective; a row is an index of dim 0, and all ranks have rows of one size. Counts may be zero.
        """
        if self.group is None:
            output.copy_(tensor)
            return
        import torch.distributed as dist

        row_bytes = tensor.nbytes // max(1, tensor.shape[0])
        self._emit_parts("all_to_all", [rows * row_bytes for rows in sent_rows], _dtype_name(tensor.dtype), call_site)
        dist.all_to_all_single(output, tensor, list(received_rows), list(sent_rows), group=self.group)

    def broadcast(self, tensor: "torch.Tensor", source: int, call_site: str) -> None:
        """Copy ``tensor`` of rank ``source`` of the group to all its ranks, in place. Collective."""
        if self.group is None:
            return
        import torch.distributed as dist

        self._emit("broadcast", tensor, call_site, source=source)
        dist.broadcast(tensor, group=self.group, group_src=source)

    def broadcast_bytes(self, payload: bytes | None, source: int, call_site: str) -> bytes:
        """Send ``payload`` of rank ``source`` to all ranks and return it. Collective; others pass None."""
        if self.group is None:
            assert payload is not None
            return payload
        import torch

        size = torch.tensor([len(payload) if payload is not None else 0], dtype=torch.int64)
        self.broadcast(size, source, call_site)
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if payload is not None:
            buffer = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        self.broadcast(buffer, source, call_site)
        return buffer.numpy().tobytes()

    def barrier(self, call_site: str) -> None:
        """Return when every rank has called it. Collective."""
        if self.group is None:
            return
        import torch.distributed as dist

        self._emit("barrier", None, call_site)
        dist.barrier(group=self.group)

    def exchange(
        self,
        sends: Sequence[tuple["torch.Tensor", int]],
        receives: Sequence[tuple["torch.Tensor", int]],
        call_site: str,
    ) -> "list[dist.Work]":
        """Issue messages to and from ranks of the group as one batch; wait on the returned handles.

        The tensors are contiguous and stay untouched until then. On NCCL the batch is one fused call on the group's own
        communicator; sends and receives issued one by one would open a communicator per pair.
        """
        assert self.group is not None, "a single process has nobody to talk to"
        import torch.distributed as dist

        operations = []
        for tensor, peer in receives:
            self._emit("receive", tensor, call_site, (peer,))
            operations.append(dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer))
        for tensor, peer in sends:
            self._emit("send", tensor, call_site, (peer,))
            operations.append(dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer))
        return dist.batch_isend_irecv(operations)

    def send(self, tensor: "torch.Tensor", peer: int, call_site: str) -> "dist.Work":
        """Start to send ``tensor`` (contiguous) to a rank of the group; it stays untouched until the handle is waited for.

        Messages from one rank to another arrive in the order in which they are sent, whatever they hold.
        """
        assert self.group is not None, "a single process has nobody to talk to"
        import torch.distributed as dist

        self._emit("send", tensor, call_site, (peer,))
        return _started(dist.isend(tensor, group=self.group, group_dst=peer))

    def receive(self, tensor: "torch.Tensor", peer: int, call_site: str) -> "dist.Work":
        """Start to receive into ``tensor`` (contiguous) from a rank of the group; wait on the handle before reading it."""
        assert self.group is not None, "a single process has nobody to talk to"
        import torch.distributed as dist

        self._emit("receive", tensor, call_site, (peer,))
        return _started(dist.irecv(tensor, group=self.group, group_src=peer))

    def tell(self, operation: Operation, tensor: "torch.Tensor", call_site: str) -> None:
        """Send a record of an operation that a library issues among the ranks of this group. Communicates nothing."""
        if self.group is not None:
            self._record(operation, tensor, call_site)

    def _emit(
        self,
        operation: Operation,
        tensor: "torch.Tensor | None",
        call_site: str,
        peers: tuple[int, ...] = (),
        source: int = 0,
    ) -> None:
        if _announce is not None:
            _announce(self, call_site)
        self._record(operation, tensor, call_site, peers, source)

    def _record(
        self,
        operation: Operation,
        tensor: "torch.Tensor | None",
        call_site: str,
        peers: tuple[int, ...] = (),
        source: int = 0,
    ) -> None:
        number = next(self._numbers)
        if not self._sinks:
            return
        num_bytes, dtype = (tensor.nbytes, _dtype_name(tensor.dtype)) if tensor is not None else (0, "")
        tier = self._tiers[peers[0] if peers else self._next]
        sent = wire_bytes(operation, num_bytes, self.size, (self.rank - source) % self.size)
        self._tell(number, operation, num_bytes, dtype, peers, call_site, tier, sent)

    def _emit_parts(self, operation: Operation, part_bytes: Sequence[int], dtype: str, call_site: str) -> None:
        """Records of an operation that sends ``part_bytes[r]`` straight to each rank r: one for every tier."""
        if _announce is not None:
            _announce(self, call_site)
        number = next(self._numbers)
        if not self._sinks:
            return
        tiers = sorted(set(self._tiers) - {"local"}) or ["local"]
        for tier in tiers:
            sent = sum(num_bytes for num_bytes, other in zip(part_bytes, self._tiers, strict=True) if other == tier)
            sent = 0 if tier == "local" else sent
            self._tell(number, operation, sent, dtype, (), call_site, tier, sent)

    def _tell(
        self,
        number: int,
        operation: Operation,
        num_bytes: int,
        dtype: str,
        peers: tuple[int, ...],
        call_site: str,
        tier: Tier,
        sent: int,
    ) -> None:
        record = CollectiveRecord(  # by position: names would double the time, and this is on the way of every message
            self.name,
            number,
            operation,
            num_bytes,
            dtype,
            peers,
            call_site,
            self.moment.step,
            self.moment.phase,
            time.monotonic(),
            self.axis,
            tier,
            sent,
        )
        for sink in self._sinks:
            sink(record)


def _started(work: "dist.Work | None") -> "dist.Work":
    assert work is not None, "this process is not in the group"
    return work


@functools.cache
def _dtype_name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


__all__ = ["CollectiveRecord", "Communicator", "Moment", "Operation", "Phase", "Sink", "Tier", "announce_to"]
