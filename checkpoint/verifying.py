"""Verifying and describing a checkpoint without loading it."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import JsonValue

from evermesh.checkpoint.committing import index_name
from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.errors import CheckpointCorrupt, ShardMapInvalid
from evermesh.checkpoint.files import CHUNK_BYTES
from evermesh.checkpoint.format import MANIFEST, Manifest
from evermesh.checkpoint.indexed import Indexes, source_of
from evermesh.checkpoint.opening import open_checkpoint
from evermesh.checkpoint.reading import ChunkReader
from evermesh.checkpoint.sources import Source


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a checkpoint."""

    kind: Literal["manifest", "index", "missing file", "extra file", "size", "checksum", "coverage"]
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
    """Bytes whose checksums were computed."""

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify(path: Path | str) -> VerifyReport:
    """Check every chunk of every file and the set of files, and that the rules of every tensor give each element to one
    place, and every rank wrote what they say.

    Not collective; reads the whole checkpoint once. What is wrong is reported, not raised.

    Raises:
        CheckpointNotFound: there is no manifest at ``path``.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except CheckpointCorrupt as error:
        return VerifyReport(path, (Problem("manifest", MANIFEST, error.fact),), 0, 0)
    problems = _extra_files(path, manifest) + _rules(manifest)
    indexes, bytes_read = Indexes(path, manifest), 0
    source = source_of(indexes)
    for rank, files in enumerate(manifest.ranks):
        found = _check_index(indexes, rank)
        problems += found
        for name in sorted(files.files) if not found or found[0].kind == "coverage" else ():
            found, num_bytes = _check_file(source, name)
            problems += found
            bytes_read += num_bytes
    return VerifyReport(path, tuple(problems), len(manifest.data_sizes), bytes_read)


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
    manifest = read_manifest(source.path) if source.kind == "evermesh" else None
    sizes = manifest.data_sizes if manifest else {name: file.num_bytes for name, file in source.files.items()}
    return {
        "format": source.kind,
        "step": source.step,
        "time_s": manifest.time_s if manifest else None,
        "world_size": source.world_size,
        "num_bytes": sum(sizes.values()),
        "description": dict(source.description),
        "objects": list(source.objects),
        "left_out": list(source.left_out),
        "files": dict(sizes),
        "tensors": tensors,
    }


def _extra_files(path: Path, manifest: Manifest) -> list[Problem]:
    names = {entry.name for entry in path.iterdir()} - manifest.sizes.keys() - {MANIFEST}
    return [Problem("extra file", name, "the manifest does not list it") for name in sorted(names)]


def _rules(manifest: Manifest) -> list[Problem]:
    problems = []
    for name, tensor in manifest.tensors.items():
        try:
            tensor.check()
        except ShardMapInvalid as error:
            problems.append(Problem("coverage", MANIFEST, f"tensor {name} of shape {tensor.shape}: {error}"))
    return problems


def _check_index(indexes: Indexes, rank: int) -> list[Problem]:
    """Whether an index is what was saved, and lists what the rank had to write."""
    name = index_name(rank)
    try:
        index = indexes.of_rank(rank)
    except CheckpointCorrupt as error:
        return [Problem("index" if (indexes.path / name).exists() else "missing file", name, error.fact)]
    wanted = Counter((part.name, part.region, part.start, part.stop) for part in indexes.plan.of_rank(rank))
    found = Counter((n, e.region, e.start, e.stop) for n, extents in index.extents.items() for e in extents)
    differing = sorted(
        (f"{n}{region}[{start}:{stop}]", found[key])
        for key in (wanted - found) | (found - wanted)
        for n, region, start, stop in [key]
    )
    return [
        Problem("coverage", name, f"{place} is there {count} times, which is not what its rule says")
        for place, count in differing
    ]


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
                text = f"chunk {chunk}, bytes {error.start} to {error.stop}: {error.fact} ({'; '.join(error.elements)})"
                problems.append(Problem("checksum", name, text))
    return problems, reader.bytes_read
