"""The index that every format is read through: which bytes of which file hold which part of which tensor.

Shards of tensor parallelism and DTensors are boxes, partitions of ZeRO and flattened parameters are intervals, fused and
stacked tensors are boxes of ours that lie in boxes of theirs (``Naming``). What a format adds is how its index is made;
intersecting and reading are the same for all of them. Imports no torch.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.errors import CheckpointCorrupt, ForeignUnusable, ShardMapInvalid
from evermesh.checkpoint.files import DIGITS
from evermesh.checkpoint.format import MANIFEST, Extent, Manifest, StoredFile, StoredTensor
from evermesh.checkpoint.naming import ForeignPart, Naming
from evermesh.checkpoint.regions import Box

Kind = Literal["evermesh", "safetensors", "deepspeed", "deepspeed-universal", "torch-distributed", "megatron"]


@dataclass(frozen=True, slots=True)
class PlainFile:
    """A file whose format has no checksums."""

    num_bytes: int


@dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint of any format, indexed: nothing of its tensors was read yet, and nothing is ever executed."""

    path: Path
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

    def tensors_in(self, file: str, start: int, stop: int) -> list[str]:
        """Names of the tensors that have elements in bytes [start, stop) of a file."""
        return [
            name
            for name, tensor in self.tensors.items()
            if any(
                e.file == file and e.offset < stop and start < e.offset + tensor.num_bytes(e) for e in tensor.extents
            )
        ]


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


def source_of(path: Path, manifest: Manifest) -> Source:
    """Our own format as a source.

    Raises:
        CheckpointCorrupt: the manifest names bytes that its files do not have, or files elsewhere.
    """
    for name, tensor in manifest.tensors.items():
        try:
            tensor.form.check()
            for extent in tensor.extents:
                tensor.form.check_inside(extent.region)
        except ShardMapInvalid as error:
            raise CheckpointCorrupt(path / MANIFEST, f"tensor {name[:100]}: {error}") from error
        known = tensor.dtype in DTYPES and all(_is_in_files(tensor, extent, manifest) for extent in tensor.extents)
        if not known:
            raise CheckpointCorrupt(path / MANIFEST, f"the tensor {name[:100]} is not in its files")
    return Source(
        path,
        "evermesh",
        manifest.tensors,
        manifest.files,
        manifest.objects,
        manifest.description,
        manifest.step,
        manifest.world_size,
        is_foreign=False,
    )


def _is_in_files(tensor: StoredTensor, extent: Extent, manifest: Manifest) -> bool:
    file = manifest.files.get(extent.file)
    if file is None or Path(extent.file).name != extent.file or "\0" in extent.file:
        return False
    num_chunks = len(file.checksums) // DIGITS
    has_length = extent.start <= extent.stop and num_chunks == file.num_chunks
    return has_length and 0 <= extent.offset <= file.num_bytes - tensor.num_bytes(extent)


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


def plain_files(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredFile | PlainFile]:
    """The files that the extents of ``tensors`` name, as they are now.

    Raises:
        ForeignUnusable: one is missing, or is not inside ``path``.
    """
    names = {extent.file for tensor in tensors.values() for extent in tensor.extents}
    return {name: PlainFile(_num_bytes(inside(path, name))) for name in sorted(names)}


def inside(path: Path, name: str) -> Path:
    """The file ``name`` of a checkpoint, which is not elsewhere. Raises ``ForeignUnusable``."""
    if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        fact = f"it names the file {name[:100]!r}, which is not inside it"
        raise ForeignUnusable(path, fact, "Do not use this checkpoint.")
    return path / name


def _num_bytes(file: Path) -> int:
    try:
        return os.stat(file).st_size
    except OSError as error:
        raise ForeignUnusable(file, f"it cannot be read: {error.strerror}", "Copy the checkpoint again.") from error
