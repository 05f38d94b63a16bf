"""The one thing that training waits for: the copy of a rank's part of the state into the arena."""

import mmap
from collections.abc import Sequence

import torch

from evermesh.checkpoint.file_plan import PlannedPart
from evermesh.checkpoint.tensors import Held, held_tensor


class ArenaCopy:
    """Copies the same tensors into ``memory`` from byte ``offset`` on, a multiple of 8: one part after the other, as often
    as asked.

    On a GPU the arena is page-locked, and a stream of its own copies into it; training's stream is not delayed by more than
    that.
    """

    def __init__(self, planned: Sequence[PlannedPart], tensors: Held, memory: mmap.mmap, offset: int = 0) -> None:
        self._memory = bytes_of_arena = torch.frombuffer(memory, dtype=torch.uint8)
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for one in planned:
            held = held_tensor(tensors, one.part.name, one.part.held)
            stop = offset + one.entry.num_bytes
            there = bytes_of_arena[offset:stop].view(held.dtype)
            self._pairs.append((there, _elements(held, one.part.start, one.part.stop)))
            offset = stop
        devices = {held.device for _, held in self._pairs if held.device.type == "cuda"}
        self._stream = torch.cuda.Stream(devices.pop()) if devices else None
        if self._stream is not None:
            _page_lock(bytes_of_arena)

    def run(self) -> None:
        """Return when the arena holds the tensors as they are now."""
        with torch.no_grad():
            if self._stream is None:
                self._copy()
                return
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                self._copy()
            self._stream.synchronize()

    def close(self) -> None:
        """Let go of the arena."""
        if self._stream is not None:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())

    def _copy(self) -> None:
        for there, held in self._pairs:
            there.copy_(held, non_blocking=True)


def _elements(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) in row-major order, as a view of the live tensor."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    if (start, stop) == (0, tensor.numel()):
        return tensor
    raise ValueError(
        f"elements {start} to {stop} of a tensor of shape {list(tensor.shape)} and strides {tensor.stride()} cannot be "
        f"copied as they change. Hold it contiguously."
    )


def _page_lock(memory: torch.Tensor) -> None:
    """So that a GPU copies into it directly; for the life of the process."""
    result = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(result) != 0:
        raise OSError(f"{memory.numel():,} bytes of shared memory cannot be page-locked (CUDA error {int(result)})")
