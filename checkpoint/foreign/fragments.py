"""How stored tensors form a tensor of the model: the few types that a format is described with. Imports no torch."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from evermesh.checkpoint.cutting import regions_of_interval
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import ForeignUnusable, ShardMapInvalid
from evermesh.checkpoint.foreign.torch_files import TorchTensor
from evermesh.checkpoint.format import Extent, StoredTensor
from evermesh.checkpoint.regions import Box, Region, StoredForm
from evermesh.checkpoint.stores.looking import name_below
from evermesh.checkpoint.stores.places import Place

_MOST_ROWS = 1 << 16
"""Of a tensor that is not contiguous: every row becomes an extent."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A stored tensor that is a box of the tensor: all of it if ``offsets`` are zeros."""

    tensor: TorchTensor
    offsets: tuple[int, ...] | None = None
    """None: zeros."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements of a stored flat tensor that are an interval of the flattened tensor, or of a flattened box of it."""

    tensor: TorchTensor
    first: int
    """Element of the stored tensor."""
    start: int
    """Element of the flattened tensor or box."""
    length: int
    box: Box | None = None
    """What tensor parallelism gave to the ranks that divided it; None: all of the tensor."""


Fragment = Whole | Slice


def assemble(root: Place, name: str, shape: Sequence[int] | StoredForm, fragments: Sequence[Fragment]) -> StoredTensor:
    """The index of the tensor ``name`` that ``fragments`` form; files are named from ``root``.

    ``shape`` is that of the tensor, or the form that boxes and flat positions refer to.

    Raises:
        ForeignUnusable: the fragments differ in type, reach outside, overlap, or leave a gap.
    """
    form = shape if isinstance(shape, StoredForm) else StoredForm(tuple(shape))
    dtypes = sorted({fragment.tensor.dtype for fragment in fragments})
    if len(dtypes) != 1:
        fact = f"is stored as {' and '.join(dtypes)}" if dtypes else "is not there"
        raise ForeignUnusable(root, f"the tensor {name} {fact}", _AGAIN)
    try:
        extents = tuple(_extents(root, name, form.stored_shape, fragments))
        stored = StoredTensor(dtypes[0], form.shape, extents, form.permutation, form.padding)
        stored.check_cover(name)
    except ShardMapInvalid as error:
        raise ForeignUnusable(root, f"its files do not fit together: {error}", _AGAIN) from error
    return stored


def placed(fragment: Fragment, box: Box) -> Fragment:
    """A fragment of a tensor as a fragment of a larger one, in which that is ``box``."""
    if isinstance(fragment, Slice):
        return replace(fragment, box=box)
    offsets = fragment.offsets or (0,) * len(box.offsets)
    return replace(fragment, offsets=tuple(a + b for a, b in zip(box.offsets, offsets, strict=True)))


def whole(root: Place, name: str, tensor: TorchTensor) -> StoredTensor:
    """The index of a tensor that is stored as one. Raises as ``assemble`` does."""
    return assemble(root, name, tensor.shape, [Whole(tensor)])


def _extents(root: Place, name: str, shape: tuple[int, ...], fragments: Sequence[Fragment]) -> Iterator[Extent]:
    for fragment in fragments:
        file = name_below(root, fragment.tensor.file)
        if isinstance(fragment, Slice):
            yield from _of_slice(file, shape, fragment)
        else:
            offsets = fragment.offsets or (0,) * len(fragment.tensor.shape)
            yield from _of_box(root, name, file, Box(offsets, fragment.tensor.shape), fragment.tensor)


def _of_slice(file: str, shape: tuple[int, ...], fragment: Slice) -> Iterator[Extent]:
    tensor, item = fragment.tensor, DTYPES[fragment.tensor.dtype].num_bytes
    if not tensor.is_contiguous or not 0 <= fragment.first <= fragment.first + fragment.length <= tensor.num_elements:
        raise ShardMapInvalid(
            f"elements {fragment.first} to {fragment.first + fragment.length} of a flat tensor of {list(tensor.shape)}"
        )
    position = tensor.position + fragment.first * item
    box = fragment.box or Box((0,) * len(shape), shape)
    regions: tuple[Region, ...]
    regions = regions_of_interval(box, shape, fragment.start, fragment.start + fragment.length)
    for region in regions:
        yield Extent(file, position, region, 0, region.num_elements)
        position += region.num_elements * item


def _of_box(root: Place, name: str, file: str, box: Box, tensor: TorchTensor) -> Iterator[Extent]:
    if tensor.is_contiguous:
        yield Extent(file, tensor.position, box, 0, box.num_elements)
        return
    outer = len(tensor.shape)
    inner = 1
    while outer and (tensor.shape[outer - 1] == 1 or tensor.stride[outer - 1] == inner):
        outer -= 1
        inner *= tensor.shape[outer]
    rows = math.prod(tensor.shape[:outer])
    if rows > _MOST_ROWS:
        raise ForeignUnusable(
            root,
            f"the tensor {name} of {list(tensor.shape)} is stored with strides {list(tensor.stride)}, as {rows:,} rows",
            "Make it contiguous before it is saved.",
        )
    item = DTYPES[tensor.dtype].num_bytes
    for index in itertools.product(*map(range, tensor.shape[:outer])):
        position = tensor.position + item * sum(i * s for i, s in zip(index, tensor.stride, strict=False))
        offsets = tuple(o + i for o, i in itertools.zip_longest(box.offsets, index, fillvalue=0))
        row = Box(offsets, (1,) * outer + tensor.shape[outer:])
        yield Extent(file, position, row, 0, row.num_elements)


_AGAIN = "A save may have been interrupted: load an earlier checkpoint, or copy this one again."
