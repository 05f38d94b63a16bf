"""Verifying and describing a checkpoint without loading it."""

from dataclasses import dataclass
from pathlib import Path
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


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a checkpoint."""

    kind: Literal["format", "manifest", "missing file", "extra file", "size", "checksum", "coverage"]
    file: str
    text: str
    """The fact, with chunk, bytes and tensors where there are any."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` found."""

    path: Path
    problems: tuple[Problem, ...]
    num_files: int
    bytes_read: int
    """Bytes whose checksums were computed; of formats that have none, bytes that could be read."""
    has_checksums: bool = True
    """False: the format has none, so that a flipped bit in a tensor cannot be told."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: Path | str) -> VerifyReport:
    """Check every chunk of every file, the set of files, and that the extents of every tensor cover it exactly once.

    Of checkpoints of other projects too; see ``evermesh.checkpoint.foreign.verifying`` for what can be told about them.
    Not collective; reads the whole checkpoint once. What is wrong is reported, not raised.

    Raises:
        CheckpointNotFound: there is no checkpoint at ``path``.
    """
    path = Path(path)
    if not (path / MANIFEST).exists():
        from evermesh.checkpoint.foreign.verifying import verify_foreign

        return verify_foreign(path)
    try:
        manifest = read_manifest(path)
    except CheckpointCorrupt as error:
        return VerifyReport(path, (Problem("manifest", MANIFEST, error.fact),), 0, 0)
    problems = _extra_files(path, manifest) + _coverage(manifest)
    source, bytes_read = source_of(path, manifest), 0
    for name in sorted(manifest.files):
        found, num_bytes = _check_file(source, name)
        problems += found
        bytes_read += num_bytes
    return VerifyReport(path, tuple(problems), len(manifest.files), bytes_read)


def describe(path: Path | str) -> dict[str, JsonValue]:
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


def _extra_files(path: Path, manifest: Manifest) -> list[Problem]:
    names = {entry.name for entry in path.iterdir()} - manifest.files.keys() - {MANIFEST}
    return [Problem("extra file", name, "the manifest does not list it") for name in sorted(names)]


def _coverage(manifest: Manifest) -> list[Problem]:
    problems = []
    for name in manifest.tensors:
        try:
            manifest.check_cover(name)
        except ShardMapInvalid as error:
            problems.append(Problem("coverage", MANIFEST, str(error)))
    return problems


def _check_file(source: Source, name: str) -> tuple[list[Problem], int]:
    """The problems of one file, and the bytes read to find them."""
    try:
        reader = ChunkReader(source, name)
    except CheckpointCorrupt as error:
        return [Problem("size" if (source.path / name).exists() else "missing file", name, error.fact)], 0
    problems, buffer = [], np.empty(CHUNK_BYTES, np.uint8)
    with reader:
        for chunk in range(reader.num_chunks):
            try:
                reader.read(chunk, buffer[: reader.size(chunk)])
            except CheckpointCorrupt as error:
                text = f"chunk {chunk}, bytes {error.start} to {error.stop}: {error.fact} ({', '.join(error.tensors)})"
                problems.append(Problem("checksum", name, text))
    return problems, reader.bytes_read
