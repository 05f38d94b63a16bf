"""Tensors that wait in host memory while their device works on something else.

On a GPU copies run beside the kernels, out on one stream and back on another, to and from page-locked memory, which
torch's allocator keeps and hands out again. On a CPU device both memories are the same: the same calls make ordinary
copies, so that what is moved can be counted and checked, and nothing is saved.
"""

from collections import deque

import torch
from torch import Tensor

_MOST_LEAVING = 4
"""Groups of tensors that may be on their way out at once, each with its memory on the device: those of two blocks (the two
rounding buffers of MEMO, arXiv 2407.12117, section 4.2)."""


class HostCopy:
    """One tensor in host memory. It comes back once."""

    def __init__(self, memory: "HostMemory", host: Tensor, left: "torch.cuda.Event | None") -> None:
        self._memory, self._host, self._left = memory, host, left
        self._came: tuple[Tensor, torch.cuda.Event] | None = None

    def prefetch(self) -> None:
        """Start to bring it back; on a GPU the copy runs beside what is issued next."""
        memory = self._memory
        if memory.incoming is None or self._came is not None:
            return
        assert self._left is not None
        device = torch.empty(self._host.shape, dtype=self._host.dtype, device=memory.device)
        memory.incoming.wait_event(self._left)
        # the allocator may have given us memory that kernels before this one still read
        memory.incoming.wait_stream(torch.cuda.current_stream(memory.device))
        with torch.cuda.stream(memory.incoming):
            device.copy_(self._host, non_blocking=True)
            self._came = device, memory.incoming.record_event()

    def take(self) -> Tensor:
        """The tensor, on the device; kernels that are issued from now on may read it."""
        self._memory.bytes_in += self._host.nbytes
        self.prefetch()
        if self._came is None:
            return self._host.clone()
        (device, event), self._came = self._came, None
        torch.cuda.current_stream(self._memory.device).wait_event(event)
        return device


class HostMemory:
    """Where the tensors of one device wait."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_gpu = device.type == "cuda"
        self.outgoing, self.incoming = (torch.cuda.Stream(device) if on_gpu else None for _ in range(2))
        self.bytes_out = 0
        """Bytes moved to the host so far."""
        self.bytes_in = 0
        """Bytes brought back so far."""
        self._leaving: deque[list[tuple[torch.cuda.Event, Tensor]]] = deque()

    def begin_group(self) -> None:
        """What is put from now on leaves together; waits, on the device, for groups that left long ago."""
        while len(self._leaving) >= _MOST_LEAVING:
            for event, _ in self._leaving.popleft():
                torch.cuda.current_stream(self.device).wait_event(event)
        self._leaving.append([])

    def put(self, tensor: Tensor) -> HostCopy:
        """Start to copy ``tensor`` to the host. It must not be changed; its memory is free once the caller drops it."""
        tensor = tensor.detach()
        self.bytes_out += tensor.nbytes
        if self.outgoing is None:
            return HostCopy(self, tensor.clone(memory_format=torch.contiguous_format), None)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.outgoing.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.outgoing):
            host.copy_(tensor, non_blocking=True)
            left = self.outgoing.record_event()
        self._leaving[-1].append((left, tensor))
        return HostCopy(self, host, left)
