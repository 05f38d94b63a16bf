"""Takes tensors, or boxes of them, out of a checkpoint of any format into one file that other tools open."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from evermesh.checkpoint.contents import Content, Piece, Stream, Tell
from evermesh.checkpoint.dtypes import DTYPES
from evermesh.checkpoint.encoding import safetensors_head
from evermesh.checkpoint.errors import CheckpointMismatch, ForeignUnusable
from evermesh.checkpoint.files import sync_directory, write_checksummed
from evermesh.checkpoint.regions import Box
from evermesh.checkpoint.safetensors_writing import entries_of, in_file_order
from evermesh.checkpoint.sources import Source

_CUT = re.compile(r"(?P<name>.+?)\[(?P<dims>[0-9:, ]*)\]")
_DIM = re.compile(r"(?P<start>\d*)(?P<colon>:?)(?P<stop>\d*)")
_OF_NUMPY = frozenset(DTYPES) - {"bfloat16", "float8_e4m3fn", "float8_e5m2"}


def extract(
    source: Source, wanted: Sequence[str], file: Path, *, dtype: str | None = None, tell: Tell | None = None
) -> dict[str, Content]:
    """Write tensors into ``file``, a new ``.safetensors``, or ``.npy`` if it is one; reads their bytes only.

    ``wanted`` are names, patterns (``fnmatch``), or names with a box, such as ``w[0:4, :]``; a box of a tensor has its
    place in its name. Floating values are converted to ``dtype``. Returns what was written, by name. The file appears
    when it is complete.

    Raises:
        CheckpointMismatch: there is no such tensor, or a box is not inside it.
        ForeignUnusable: the file is there already, of another kind, or cannot hold what is wanted.
        CheckpointCorrupt: bytes are not those that were saved.
    """
    contents = {key: content for one in wanted for key, content in _found(source, one, dtype)}
    temporary = file.with_name(f".extracting-{file.name}")
    if file.exists():
        raise ForeignUnusable(file, "it is there already", "Name a new file.")
    if file.suffix == ".npy":
        ordered, head = contents, _numpy_head(file, contents)
    elif file.suffix == ".safetensors":
        ordered = in_file_order(contents)
        head = safetensors_head(entries_of(ordered), {"format": "pt"})
    else:
        raise ForeignUnusable(
            file, f"{file.suffix or 'no suffix'} is no kind of file for tensors", "End it in .safetensors or .npy."
        )
    try:
        temporary.unlink(missing_ok=True)
        write_checksummed(temporary, _payloads(head, Stream(source, list(ordered.values()), tell), ordered))
        os.rename(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(file.parent)
    return contents


def _payloads(head: bytes, stream: Stream, contents: Mapping[str, Content]) -> Iterator[memoryview | bytes]:
    yield head
    for content in contents.values():
        yield from stream.take(content)


def _found(source: Source, wanted: str, dtype: str | None) -> Iterator[tuple[str, Content]]:
    """What a name, a pattern or a name with a box means."""
    if wanted in source.tensors:
        yield wanted, _content(source, wanted, _whole(source, wanted), dtype)
        return
    match = _CUT.fullmatch(wanted)
    if match is not None and match["name"] in source.tensors:
        box = _box(source, match["name"], match["dims"])
        yield f"{match['name']}{box}", _content(source, match["name"], box, dtype)
        return
    matching = [name for name in source.tensors if fnmatchcase(name, wanted)]
    if not matching:
        raise CheckpointMismatch(source.path, [f"missing in the checkpoint: {wanted}"])
    for name in matching:
        yield name, _content(source, name, _whole(source, name), dtype)


def _whole(source: Source, name: str) -> Box:
    shape = source.tensors[name].shape
    return Box((0,) * len(shape), shape)


def _content(source: Source, name: str, box: Box, dtype: str | None) -> Content:
    stored = source.tensors[name].dtype
    is_converted = dtype is not None and stored in ("float64", "float32", "float16", "bfloat16")
    return Content(dtype if is_converted and dtype else stored, box.sizes, (Piece(name, box),))


def _box(source: Source, name: str, dims: str) -> Box:
    shape = source.tensors[name].shape
    given = [dim.strip() for dim in dims.split(",")] if dims.strip() else []
    offsets, sizes = [], []
    problem = f"{name} is {list(shape)}, of which [{dims}] is no box"
    if len(given) > len(shape):
        raise CheckpointMismatch(source.path, [problem])
    for size, dim in zip(shape, [*given, *(":" for _ in range(len(shape) - len(given)))], strict=True):
        match = _DIM.fullmatch(dim)
        if match is None or not dim:
            raise CheckpointMismatch(source.path, [problem])
        start = int(match["start"] or 0)
        stop = int(match["stop"] or size) if match["colon"] else start + 1
        if not start <= stop <= size:
            raise CheckpointMismatch(source.path, [problem])
        offsets.append(start)
        sizes.append(stop - start)
    return Box(tuple(offsets), tuple(sizes))


def _numpy_head(file: Path, contents: Mapping[str, Content]) -> bytes:
    if len(contents) != 1:
        raise ForeignUnusable(file, f"{len(contents)} tensors are wanted", "Write them into a .safetensors file.")
    (content,) = contents.values()
    if content.dtype not in _OF_NUMPY:
        raise ForeignUnusable(file, f"numpy has no {content.dtype}", "Convert it with --dtype, or write .safetensors.")
    kind = np.dtype(content.dtype)
    description = f"{{'descr': {kind.str!r}, 'fortran_order': False, 'shape': {content.shape!r}, }}".encode()
    # version 1.0 of the format: a magic text, the length of the description, and spaces up to a multiple of 64
    description += b" " * (-(10 + len(description) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(description).to_bytes(2, "little") + description
