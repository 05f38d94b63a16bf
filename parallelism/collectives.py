"""The one tap through which the project's own communication passes, and the record it emits.

Every collective and point-to-point message of the project is issued through :class:`Communicator`; whoever listens
(the byte ledger, the recorder of the fault room, a test) gets one :class:`CollectiveRecord` for each.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

Operation = Literal["all_reduce", "all_gather", "broadcast", "barrier", "send", "receive"]
Phase = Literal["start-up", "compile", "train", "evaluate", "checkpoint"]


@dataclass(frozen=True, slots=True)
class CollectiveRecord:
    """One collective or message as its caller saw it. Serialised as a flat JSON object (``to_dict``/``from_dict``)."""

    group: str
    """Name of the process group."""
    sequence: int
    """Number of the operation in its group on this rank, from 0."""
    operation: Operation
    num_bytes: int
    """Bytes of the local buffer."""
    dtype: str
    peers: tuple[int, ...]
    """Ranks on the other side: one for a message, empty when the whole group takes part."""
    call_site: str
    """What the caller was doing, such as ``ring forward`` or ``gradients``."""
    step: int
    phase: Phase
    enqueued_s: float
    """Host clock (monotonic, seconds) when the operation was issued; on a GPU not the time it ran."""

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The record that ``to_dict`` described."""
        return cls(**{**values, "peers": tuple(values["peers"])})


Sink = Callable[[CollectiveRecord], None]


class ByteLedger:
    """Counts bytes by call site and operation; a sink for a tap."""

    def __init__(self) -> None:
        self.num_bytes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()

    def __call__(self, record: CollectiveRecord) -> None:
        """Add one record."""
        if record.operation == "receive":
            return  # the sender has counted it
        self.num_bytes[record.call_site] += record.num_bytes
        self.messages[record.call_site] += 1

    def take(self) -> dict[str, int]:
        """Bytes by call site since the last call."""
        taken = dict(self.num_bytes)
        self.num_bytes.clear()
        self.messages.clear()
        return taken


class Communicator:
    """A process group with a tap. With ``group=None`` it stands for a single process, and collectives do nothing."""

    def __init__(self, group: "dist.ProcessGroup | None" = None, *, name: str = "world") -> None:
        self.group, self.name = group, name
        self.step = 0
        self.phase: Phase = "start-up"
        self._numbers = itertools.count()
        self._sinks: list[Sink] = []

    @property
    def rank(self) -> int:
        """Rank of this process in the group."""
        return self.group.rank() if self.group is not None else 0

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return self.group.size() if self.group is not None else 1

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

    def broadcast(self, tensor: "torch.Tensor", source: int, call_site: str) -> None:
        """Copy ``tensor`` of rank ``source`` of the group to all its ranks, in place. Collective."""
        if self.group is None:
            return
        import torch.distributed as dist

        self._emit("broadcast", tensor, call_site)
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
            self._emit("receive", tensor, call_site, peer)
            operations.append(dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer))
        for tensor, peer in sends:
            self._emit("send", tensor, call_site, peer)
            operations.append(dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer))
        return dist.batch_isend_irecv(operations)

    def _emit(self, operation: Operation, tensor: "torch.Tensor | None", call_site: str, *peers: int) -> None:
        number = next(self._numbers)
        if not self._sinks:
            return
        record = CollectiveRecord(
            group=self.name,
            sequence=number,
            operation=operation,
            num_bytes=tensor.numel() * tensor.element_size() if tensor is not None else 0,
            dtype=str(tensor.dtype).removeprefix("torch.") if tensor is not None else "",
            peers=peers,
            call_site=call_site,
            step=self.step,
            phase=self.phase,
            enqueued_s=time.monotonic(),
        )
        for sink in self._sinks:
            sink(record)


__all__ = ["ByteLedger", "CollectiveRecord", "Communicator", "Operation", "Phase", "Sink"]
