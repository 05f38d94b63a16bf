"""Verifying and describing a checkpoint without loading it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import JsonValue

from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.errors import CheckpointCorrupt, ShardMapInvalid
from evermesh.checkpoint.files import CHUNK_BYTES
from evermesh.checkpoint.format import MANIFEST, Manifest
from evermesh.checkpoint.opening import open_checkpoint
from evermesh.checkpoint.reading import ChunkReader
from evermesh.checkpoint.sources import Source, source_of
from evermesh.checkpoint.stores.attempts import folder_of
from evermesh.checkpoint.stores.places import Place, place_of
from evermesh.checkpoint.stores.store import store_of


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a checkpoint."""

    kind: Literal["manifest", "missing file", "extra file", "size", "checksum", "coverage"]
    file: str
    text: str
    """The fact, with chunk, bytes and tensors where there are any."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` found."""

    path: Place
    problems: tuple[Problem, ...]
    num_files: int
    bytes_read: int
    """Bytes whose checksums were computed."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: Place | str) -> VerifyReport:
    """Check every chunk of every file, the set of files, and that the extents of every tensor cover it exactly once.

    Not collective; reads the whole checkpoint once. What is wrong is reported, not raised.

    Raises:
        CheckpointNotFound: there is no manifest at ``path``.
    """
    path = place_of(path)
    try:
        manifest = read_manifest(path)
    except CheckpointCorrupt as error:
        return VerifyReport(path, (Problem("manifest", MANIFEST, error.fact),), 0, 0)
    folder = folder_of(path)
    sizes = store_of(folder).sizes(folder)
    extra = sorted(sizes.keys() - manifest.files.keys() - {MANIFEST})
    problems = [Problem("extra file", name, "the manifest does not list it") for name in extra] + _coverage(manifest)
    source, bytes_read = source_of(folder, manifest), 0
    for name in sorted(manifest.files):
        found, num_bytes = _check_file(source, name, is_there=name in sizes)
        problems += found
        bytes_read += num_bytes
    return VerifyReport(path, tuple(problems), len(manifest.files), bytes_read)


def describe(path: Place | str) -> dict[str, JsonValue]:
    """What is in a checkpoint of any format, as JSON: sizes, description, objects by name, every tensor and its files.

    Raises:
        CheckpointNotFound: there is none at ``path``.
        CheckpointCorrupt, ForeignUnusable: there is one that cannot be read.
    """
    source = open_checkpoint(path)
    tensors: list[JsonValue] = [
        {
            "name": name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "num_bytes": sum(tensor.num_bytes(extent) for extent in tensor.extents),
            "num_extents": len(tensor.extents),
            "files": list(dict.fromkeys(extent.file for extent in tensor.extents)),
        }
        for name, tensor in source.tensors.items()
    ]
    return {
        "format": source.kind,
        "step": source.step,
        "time_s": read_manifest(source.path).time_s if source.kind == "evermesh" else None,
        "world_size": source.world_size,
        "num_bytes": sum(file.num_bytes for file in source.files.values()),
        "description": dict(source.description),
        "objects": list(source.objects),
        "left_out": list(source.left_out),
        "files": {name: file.num_bytes for name, file in source.files.items()},
        "tensors": tensors,
    }


def _coverage(manifest: Manifest) -> list[Problem]:
    problems = []
    for name in manifest.tensors:
        try:
            manifest.check_cover(name)
        except ShardMapInvalid as error:
            problems.append(Problem("coverage", MANIFEST, str(error)))
    return problems


def _check_file(source: Source, name: str, *, is_there: bool) -> tuple[list[Problem], int]:
    """The problems of one file, and the bytes read to find them."""
    try:
        reader = ChunkReader(source, name)
    except CheckpointCorrupt as error:
        return [Problem("size" if is_there else "missing file", name, error.fact)], 0
    problems, buffer = [], np.empty(CHUNK_BYTES, np.uint8)
    with reader:
        reader.expect(range(reader.num_chunks))
        for chunk in range(reader.num_chunks):
            try:
                reader.read(chunk, buffer[: reader.size(chunk)])
            except CheckpointCorrupt as error:
                text = f"chunk {chunk}, bytes {error.start} to {error.stop}: {error.fact} ({', '.join(error.tensors)})"
                problems.append(Problem("checksum", name, text))
    return problems, reader.bytes_read
