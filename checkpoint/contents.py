"""Tensors that are to be written into files of any format, and their bytes, streamed out of a checkpoint of any format.

A *content* is a tensor of a file before it is written: pieces of tensors of a source laid into its row-major storage.
Whatever a format makes of a tensor (the whole, a box, a padded flat partition of many) is such a content, so that one
reader with one bound on memory serves every writer.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from evermesh.checkpoint.cutting import regions_of_interval
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.filling import Target, fill
from evermesh.checkpoint.loading import FLOATING
from evermesh.checkpoint.regions import Box, Interval, Region
from evermesh.checkpoint.sources import Found, Source, find
from evermesh.checkpoint.tensors import byte_view

GROUP_BYTES = 64 << 20
"""Contents are read in groups of at most this size, whatever the size of a tensor."""
Tell = Callable[[int], None]
"""Is told how many bytes more were written."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A region of a tensor of the source, and where it goes."""

    name: str
    region: Region
    """In the logical form of the tensor."""
    at: int = 0
    """Element of the content with which the row-major storage of the region begins."""


@dataclass(frozen=True, eq=False, slots=True)
class Content:
    """A tensor that is to be written. Elements that no piece fills are zeros."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    values: torch.Tensor | None = field(default=None, repr=False)
    """What to write, if it comes from no source; on the host, contiguous, of the type and shape above."""

    @property
    def num_elements(self) -> int:
        """Elements of the content."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the content."""
        return self.num_elements * DTYPES[self.dtype].num_bytes


def whole(source: Source, name: str, dtype: str | None = None) -> Content:
    """A tensor of ``source`` as it is, or converted to ``dtype``."""
    stored = source.tensors[name]
    return Content(dtype or stored.dtype, stored.shape, (Piece(name, Interval(0, math.prod(stored.shape))),))


class Stream:
    """The bytes of ``contents`` in their order, read from ``source`` on the way. Not collective.

    Values of floating types are converted to those of the contents, rounded to the nearest. Memory is about
    3 x ``GROUP_BYTES``, however large a tensor is.

    Raises:
        ForeignUnusable: a piece is of a type that cannot be converted to that of its content; nothing was read.
        CheckpointCorrupt: when bytes are read that are not those that were saved.
    """

    def __init__(self, source: Source, contents: Sequence[Content], tell: Tell | None = None) -> None:
        for content in contents:
            _check_types(source, content)
        # contents say which conversions there are, so that a checkpoint of ours is converted too
        self._source, self._tell = source, tell or (lambda num_bytes: None)
        self._found, _ = find(source, None)
        self._views = self._read(contents)

    def take(self, content: Content) -> Iterator[memoryview]:
        """The bytes of the next content."""
        left = content.num_bytes
        while left:
            view = next(self._views)
            left -= view.nbytes
            assert left >= 0, "contents are taken in the order in which they were given"
            yield view
            self._tell(view.nbytes)

    def _read(self, contents: Sequence[Content]) -> Iterator[memoryview]:
        for group in _groups(contents):
            tensors = [_buffer(content, start, stop) for content, start, stop in group]
            targets: dict[str, list[Target]] = {}
            for (content, start, stop), tensor in zip(group, tensors, strict=True):
                for piece in content.pieces:
                    for name, target in _targets(self._found, piece, start, stop, tensor):
                        targets.setdefault(name, []).append(target)
            fill(self._source, self._found, targets, {})
            yield from (byte_view(tensor).data for tensor in tensors)


def shard(source: Source, name: str, box: Box) -> Content:
    """A box of a tensor of ``source`` as it is."""
    return Content(source.tensors[name].dtype, box.sizes, (Piece(name, box),))


def _check_types(source: Source, content: Content) -> None:
    for piece in content.pieces:
        stored = source.tensors[piece.name].dtype
        if stored != content.dtype and not (stored in FLOATING and content.dtype in FLOATING):
            fact = f"{piece.name} is {stored}, and is to be written as {content.dtype}"
            raise ForeignUnusable(source.path, fact, f"Only {', '.join(FLOATING)} are converted.")


def _groups(contents: Sequence[Content]) -> Iterator[list[tuple[Content, int, int]]]:
    """Slices of contents, by elements, that together have at most ``GROUP_BYTES``."""
    group: list[tuple[Content, int, int]] = []
    free = GROUP_BYTES
    for content in contents:
        start, item = 0, DTYPES[content.dtype].num_bytes
        while start < content.num_elements:
            if free < item:
                yield group
                group, free = [], GROUP_BYTES
            stop = min(content.num_elements, start + free // item)
            group.append((content, start, stop))
            free -= (stop - start) * item
            start = stop
    if group:
        yield group


def _buffer(content: Content, start: int, stop: int) -> torch.Tensor:
    if content.values is not None:
        return content.values.view(-1)[start:stop]
    return torch.zeros(stop - start, dtype=getattr(torch, content.dtype))


def _targets(
    found: Mapping[str, Found], piece: Piece, start: int, stop: int, tensor: torch.Tensor
) -> Iterator[tuple[str, Target]]:
    """What fills elements [start, stop) of a content, which are ``tensor``, from a piece of it."""
    first, last = max(start, piece.at), min(stop, piece.at + piece.region.num_elements)
    if first >= last:
        return
    for region in _cut(piece.region, found[piece.name].shape, first - piece.at, last - piece.at):
        there = tensor[first - start : first - start + region.num_elements]
        yield piece.name, (region, there)
        first += region.num_elements


def _cut(region: Region, shape: tuple[int, ...], start: int, stop: int) -> tuple[Region, ...]:
    """Regions whose storages, laid end to end, are elements [start, stop) of the storage of ``region``."""
    if isinstance(region, Interval):
        return (Interval(region.start + start, region.start + stop),)
    return regions_of_interval(region, shape, start, stop)
