"""Compares two checkpoints, of whatever formats and topologies, tensor by tensor and bit by bit; converts nothing."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue

from evermesh.checkpoint.contents import Tell
from evermesh.checkpoint.filling import Target, fill
from evermesh.checkpoint.foreign.deepspeed_model import BUFFER, PARAMETER
from evermesh.checkpoint.foreign.training import in_our_names, training_of
from evermesh.checkpoint.naming import Naming
from evermesh.checkpoint.regions import Interval
from evermesh.checkpoint.sources import Found, Source, find

_GROUP_ELEMENTS = 8 << 20
"""Elements of each checkpoint that are in memory at a time."""


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """A tensor whose elements differ."""

    name: str
    num_elements: int
    num_differing: int
    first: tuple[int, ...]
    """Index of the first element that differs."""
    values: tuple[float, float]
    """There, in both checkpoints."""
    largest: float
    """Largest absolute difference; NaN if a number meets none."""


@dataclass(frozen=True, slots=True)
class DiffReport:
    """What ``diff`` found. Names are those of training states, see ``in_our_names``."""

    missing: tuple[str, ...]
    """Tensors that only the first checkpoint has."""
    extra: tuple[str, ...]
    """Tensors that only the second has."""
    other_kind: tuple[str, ...]
    """Tensors of other shapes, or, if bits count, of other types; with both."""
    differing: tuple[TensorDifference, ...]
    objects: tuple[str, ...]
    """Places in what is no tensor, with both values."""
    num_compared: int
    """Tensors."""

    @property
    def same(self) -> bool:
        """Whether both hold the same tensors and the same objects."""
        return not (self.missing or self.extra or self.other_kind or self.differing or self.objects)


def diff(
    a: Source, b: Source, *, tolerance: float | None = None, names: Naming | None = None, tell: Tell | None = None
) -> DiffReport:
    """Compare all tensors and objects of two checkpoints. Not collective; reads both once, in bounded memory.

    Without ``tolerance`` every bit must agree. With it, numbers may differ by so much relative to the larger one, and
    floating types need not be the same. ``names`` is a table of how tensors of ``a`` are called and cut in ``b``. A tied
    weight is compared once.

    Raises:
        CheckpointCorrupt, ForeignUnusable: one of them cannot be read.
    """
    a, b = _untied(a), _untied(b)
    a, b = _told(a, b), _told(b, a)
    ours, _ = find(a, None)
    theirs, misfits = find(b, names)
    common = [name for name in ours if name in theirs]
    kinds = {name: line for name in common if (line := _other_kind(name, ours[name], theirs[name], tolerance))}
    alike = [name for name in common if name not in kinds]
    found: dict[str, TensorDifference] = {}
    for name, start, one, other in _pairs((a, ours), (b, theirs), alike, tell):
        _compare(found, name, ours[name].shape, start, one, other, tolerance)
    asked = ours.keys() | (names.foreign_shapes.keys() if names is not None else set())
    return DiffReport(
        missing=tuple(name for name in ours if name not in theirs),
        extra=tuple(name for name in b.tensors if name not in asked),
        other_kind=(*kinds.values(), *misfits),
        differing=tuple(found.values()),
        objects=tuple(_values("", dict(a.objects), dict(b.objects))),
        num_compared=len(alike),
    )


def _untied(source: Source) -> Source:
    """The source under our names, with one name for a tied weight and for each of its states."""
    aliases = training_of(source, []).aliases
    source = in_our_names(source)
    kept = {name: t for name, t in source.tensors.items() if name.partition(".")[2] not in aliases}
    return replace(source, tensors=kept)


def _told(source: Source, other: Source) -> Source:
    """Where a format does not tell buffers from weights, the other one does."""

    def name_of(name: str) -> str:
        buffer = BUFFER + name.removeprefix(PARAMETER)
        return buffer if name.startswith(PARAMETER) and name not in other.tensors and buffer in other.tensors else name

    return replace(source, tensors={name_of(name): tensor for name, tensor in source.tensors.items()})


def _other_kind(name: str, one: Found, other: Found, tolerance: float | None) -> str | None:
    types_differ = one.dtype != other.dtype and (tolerance is None or not _both_floating(one.dtype, other.dtype))
    if one.shape == other.shape and not types_differ:
        return None
    return f"{name}: {one.dtype} {list(one.shape)} and {other.dtype} {list(other.shape)}"


def _both_floating(*dtypes: str) -> bool:
    return all(getattr(torch, dtype).is_floating_point for dtype in dtypes)


_Side = tuple[Source, Mapping[str, Found]]


def _pairs(
    a: _Side, b: _Side, names: list[str], tell: Tell | None
) -> Iterator[tuple[str, int, torch.Tensor, torch.Tensor]]:
    """Stretches of tensors of both: name, first element, elements."""
    for group in _groups(a[1], names):
        one, other = (_read(side, group) for side in (a, b))
        for (name, start, _), x, y in zip(group, one, other, strict=True):
            yield name, start, x, y
            if tell is not None:
                tell(x.nbytes)


def _groups(found: Mapping[str, Found], names: list[str]) -> Iterator[list[tuple[str, int, int]]]:
    group: list[tuple[str, int, int]] = []
    free = _GROUP_ELEMENTS
    for name in names:
        start, size = 0, math.prod(found[name].shape)
        while start < size:
            stop = min(size, start + free)
            group.append((name, start, stop))
            free -= stop - start
            start = stop
            if not free:
                yield group
                group, free = [], _GROUP_ELEMENTS
    if group:
        yield group


def _read(side: _Side, group: list[tuple[str, int, int]]) -> list[torch.Tensor]:
    source, found = side
    tensors = [torch.empty(stop - start, dtype=getattr(torch, found[name].dtype)) for name, start, stop in group]
    targets: dict[str, list[Target]] = {}
    for (name, start, stop), tensor in zip(group, tensors, strict=True):
        targets.setdefault(name, []).append((Interval(start, stop), tensor))
    fill(source, found, targets, {})
    return tensors


def _compare(
    found: dict[str, TensorDifference],
    name: str,
    shape: tuple[int, ...],
    start: int,
    one: torch.Tensor,
    other: torch.Tensor,
    tolerance: float | None,
) -> None:
    """Add what differs between two stretches of a tensor to ``found``."""
    places = torch.nonzero(_differ(one, other, tolerance)).flatten()
    if not len(places):
        return
    x, y = one[places].to(torch.float64), other[places].to(torch.float64)
    largest = float((x - y).abs().max())
    at = int(places[0])
    before = found.get(name)
    if before is not None:
        largest = max(largest, before.largest) if not math.isnan(before.largest) else math.nan
        found[name] = replace(before, num_differing=before.num_differing + len(places), largest=largest)
        return
    index = tuple(int(i) for i in np.unravel_index(start + at, shape)) if shape else ()
    found[name] = TensorDifference(name, math.prod(shape), len(places), index, (float(x[0]), float(y[0])), largest)


def _differ(one: torch.Tensor, other: torch.Tensor, tolerance: float | None) -> torch.Tensor:
    """By element, whether two stretches differ."""
    if tolerance is None:
        item = one.element_size()
        return (one.view(torch.uint8).view(-1, item) != other.view(torch.uint8).view(-1, item)).any(1)
    if one.is_complex():
        return one != other
    x, y = one.to(torch.float64), other.to(torch.float64)
    is_near = (x - y).abs() <= tolerance * torch.maximum(x.abs(), y.abs())
    return ~(is_near | (x == y) | (x.isnan() & y.isnan()))


def _values(place: str, one: JsonValue, other: JsonValue) -> Iterator[str]:
    """Where two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in (*one, *(key for key in other if key not in one)):
            below = f"{place}.{key}" if place else key
            yield from _values(below, one.get(key, _ABSENT), other.get(key, _ABSENT))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, pair in enumerate(zip(one, other, strict=True)):
            yield from _values(f"{place}[{index}]", *pair)
    elif one != other and not (_is_nan(one) and _is_nan(other)):
        yield f"{place}: {_short(one)} and {_short(other)}"


_ABSENT: Any = object()


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _short(value: Any) -> str:
    text = "nothing" if value is _ABSENT else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
