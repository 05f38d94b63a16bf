"""Tensors of one checkpoint that are read when they are written into another: what ``save`` takes in place of tensors."""

import math
from collections.abc import Iterator, Mapping

import torch

from evermesh.checkpoint.contents import Tell
from evermesh.checkpoint.filling import fill
from evermesh.checkpoint.regions import Interval
from evermesh.checkpoint.sources import Found, Source
from evermesh.checkpoint.tensors import SLICE_BYTES, byte_view


class Streamed:
    """A whole tensor of ``source``, flat, of which no more than 16 MiB are in memory."""

    def __init__(self, source: Source, found: Mapping[str, Found], name: str, tell: Tell | None = None) -> None:
        self._source, self._found, self._name, self._tell = source, found, name, tell
        self.dtype: torch.dtype = getattr(torch, found[name].dtype)

    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self._found[self._name].shape)

    def slices(self, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes of elements [start, stop). Raises ``CheckpointCorrupt`` if they are not those that were saved."""
        step = SLICE_BYTES // self.dtype.itemsize
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            tensor = torch.empty(end - begin, dtype=self.dtype)
            fill(self._source, self._found, {self._name: [(Interval(begin, end), tensor)]}, {})
            yield byte_view(tensor).data
            if self._tell is not None:
                self._tell(tensor.nbytes)
