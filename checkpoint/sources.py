"""The index that every format is read through: which bytes of which file hold which part of which tensor.

Shards of tensor parallelism and DTensors are boxes, partitions of ZeRO and flattened parameters are intervals, fused and
stacked tensors are boxes of ours that lie in boxes of theirs (``Naming``). What a format adds is how its index is made;
intersecting and reading are the same for all of them. Imports no torch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path, PurePath
from typing import Literal

from pydantic import JsonValue

from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.format import Extent, StoredFile, StoredTensor
from evermesh.checkpoint.naming import ForeignPart, Naming
from evermesh.checkpoint.recovery import Recovery
from evermesh.checkpoint.regions import Box
from evermesh.checkpoint.stores.looking import num_bytes
from evermesh.checkpoint.stores.places import Place
from evermesh.checkpoint.stores.store import OpenFile, store_of

Kind = Literal["evermesh", "safetensors", "deepspeed", "deepspeed-universal", "torch-distributed", "megatron"]


@dataclass(frozen=True, slots=True)
class PlainFile:
    """A file whose format has no checksums."""

    num_bytes: int


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint of any format, indexed: nothing of its tensors was read yet, and nothing is ever executed."""

    path: Place
    kind: Kind
    tensors: Mapping[str, StoredTensor]
    """By the names that the format gives them; a tensor with two names is here twice, with the same extents."""
    files: Mapping[str, StoredFile | PlainFile]
    """By path relative to ``path``."""
    objects: Mapping[str, JsonValue] = field(default_factory=dict)
    """What it holds besides tensors."""
    description: Mapping[str, JsonValue] = field(default_factory=dict)
    step: int | None = None
    """At which it was saved, if it says so."""
    world_size: int | None = None
    """Ranks that saved it, if it says so."""
    left_out: tuple[str, ...] = ()
    """What it holds that is neither a tensor nor a JSON value, such as objects of classes that we do not know."""
    is_foreign: bool = True
    """Floating values are converted to the type they are wanted in."""
    locate: Callable[[Extent], int] = attrgetter("offset")
    """Position of the first element of an extent in its file; some formats tell only in the file itself."""

    extents_in: Callable[[str], Iterable[tuple[str, Extent]]] | None = None
    """The extents of a file, with the names of their tensors; None: whoever asks looks at all."""
    sizes: Callable[[], Mapping[str, int]] | None = None
    """Bytes of all files that have checksums, told without looking into any of them; None: none have checksums."""
    recovery: Recovery | None = None
    """What makes lost or damaged bytes again; None: nothing does."""
    open_file: Callable[[str], OpenFile] | None = None
    """Opens one of the files, which are at different places; None: all are below ``path``."""

    @property
    def directory(self) -> Path:
        """``path`` in a file system, where all checkpoints of other projects are."""
        assert isinstance(self.path, Path), self.path
        return self.path

    def open(self, file: str) -> OpenFile:
        """One of the files, to read. Raises ``FileNotFoundError``."""
        place = self.path / file
        return store_of(place).open(place) if self.open_file is None else self.open_file(file)

    def tensors_in(self, file: str, start: int, stop: int) -> list[str]:
        """Names of the tensors that have elements in bytes [start, stop) of a file."""
        return list(dict.fromkeys(name for name, _, _, _ in self._elements_in(file, start, stop)))

    def elements_in(self, file: str, start: int, stop: int) -> list[str]:
        """What bytes [start, stop) of a file hold, as text: tensors with their regions, and which elements of these."""
        return [
            f"{name}{extent.region} elements {first:,} to {last:,}"
            for name, extent, first, last in self._elements_in(file, start, stop)
        ]

    def _elements_in(self, file: str, start: int, stop: int) -> Iterator[tuple[str, Extent, int, int]]:
        """Extents, and [first, last) of the row-major storage of their regions."""
        for name, extent in self._of_file(file):
            item = DTYPES[self.tensors[name].dtype].num_bytes
            end = extent.offset + (extent.stop - extent.start) * item
            if extent.offset < stop and start < end:
                first = extent.start + (max(start, extent.offset) - extent.offset) // item
                yield name, extent, first, extent.start - (extent.offset - min(stop, end)) // item

    def _of_file(self, file: str) -> Iterable[tuple[str, Extent]]:
        if self.extents_in is not None:
            return self.extents_in(file)
        tensors = self.tensors.items()
        return ((name, extent) for name, tensor in tensors for extent in tensor.extents if extent.file == file)


@dataclass(frozen=True, slots=True)
class Found:
    """A tensor as it is asked for, and what makes it up."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[ForeignPart, ...]
    """Boxes of it that lie in tensors of the source; one, and all of it, if nothing was renamed."""


def find(source: Source, naming: Naming | None) -> tuple[dict[str, Found], list[str]]:
    """The tensors of ``source`` under the names of ``naming`` (None: its own), and what does not fit the table.

    Tensors that are missing in the source are left out, and are no misfit.
    """
    if naming is None:
        whole = {name: Box((0,) * len(tensor.shape), tensor.shape) for name, tensor in source.tensors.items()}
        found = {n: Found(t.dtype, t.shape, (ForeignPart(n, 0, whole[n]),)) for n, t in source.tensors.items()}
        return found, []
    found, misfits = {}, []
    for name, shape in naming.foreign_shapes.items():
        if name in source.tensors and source.tensors[name].shape != shape:
            misfits.append(f"{name} is {list(source.tensors[name].shape)} there, the table of names says {list(shape)}")
    for name, parts in naming.parts.items():
        if any(part.name not in source.tensors for part in parts):
            continue
        dtypes = sorted({source.tensors[part.name].dtype for part in parts})
        if len(dtypes) > 1:
            misfits.append(f"what makes up {name} is of types {' and '.join(dtypes)}")
        found[name] = Found(dtypes[0], naming.shapes[name], parts)
    return found, misfits


def with_prefixes(naming: Naming, ours: tuple[str, ...], theirs: tuple[str, ...]) -> Naming:
    """A table of the names of weights, for everything that exists once per weight, such as moments.

    ``ours`` and ``theirs`` are what stands before the name of a weight, in the same order.
    """
    pairs = list(zip(ours, theirs, strict=True))
    return Naming(
        {
            before + name: tuple(replace(part, name=there + part.name) for part in parts)
            for before, there in pairs
            for name, parts in naming.parts.items()
        },
        {before + name: shape for before in ours for name, shape in naming.shapes.items()},
        {before + name: shape for before in theirs for name, shape in naming.foreign_shapes.items()},
        naming.unread,
    )


def plain_files(path: Place, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredFile | PlainFile]:
    """The files that the extents of ``tensors`` name, as they are now.

    Raises:
        ForeignUnusable: one is missing, or is not inside ``path``.
    """
    names = {extent.file for tensor in tensors.values() for extent in tensor.extents}
    places = {name: inside(path, name) for name in sorted(names)}
    if not isinstance(path, Path):
        return _objects(path, places)
    return {name: PlainFile(_num_bytes(place)) for name, place in places.items()}


def inside(path: Place, name: str) -> Place:
    """The file ``name`` of a checkpoint, which is not elsewhere. Raises ``ForeignUnusable``."""
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts or "\0" in name:
        fact = f"it names the file {name[:100]!r}, which is not inside it"
        raise ForeignUnusable(path, fact, "Do not use this checkpoint.")
    return path / name


def _objects(path: Place, places: Mapping[str, Place]) -> dict[str, StoredFile | PlainFile]:
    """With their sizes, by one request."""
    sizes = store_of(path).sizes(path)
    for name, place in places.items():
        if name not in sizes:
            raise ForeignUnusable(place, "there is no such object", "Copy the checkpoint again.")
    return {name: PlainFile(sizes[name]) for name in places}


def _num_bytes(file: Place) -> int:
    try:
        return num_bytes(file)
    except OSError as error:
        raise ForeignUnusable(file, f"it cannot be read: {error.strerror}", "Copy the checkpoint again.") from error
