"""Verifying and describing a checkpoint without loading it."""

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import JsonValue

from evermesh.checkpoint.committing import index_name
from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.errors import CheckpointCorrupt, ShardMapInvalid
from evermesh.checkpoint.files import CHUNK_BYTES
from evermesh.checkpoint.format import MANIFEST, Manifest, RankFiles, StoredFile
from evermesh.checkpoint.indexed import Indexes, index_of, source_of
from evermesh.checkpoint.opening import open_checkpoint
from evermesh.checkpoint.parity import ParityPart
from evermesh.checkpoint.reading import ChunkReader
from evermesh.checkpoint.sources import Source
from evermesh.checkpoint.stores.attempts import folder_of
from evermesh.checkpoint.stores.looking import is_file
from evermesh.checkpoint.stores.places import Place, place_of
from evermesh.checkpoint.stores.store import store_of

Kind = Literal["format", "manifest", "index", "missing file", "extra file", "size", "checksum", "coverage"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a checkpoint."""

    kind: Kind
    file: str
    text: str
    """The fact, with chunk, bytes and tensors where there are any."""
    repairable: bool = False
    """Whether ``repair`` makes good for it."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What ``verify`` found."""

    path: Place
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

    @property
    def repairable(self) -> bool:
        """Whether ``repair`` makes good for everything that is wrong."""
        return all(problem.repairable for problem in self.problems)


def verify(path: Place | str) -> VerifyReport:
    """Check every chunk of every file and the set of files, and that the rules of every tensor give each element to one
    place, and every rank wrote what they say.

    Of checkpoints of other projects too; see ``evermesh.checkpoint.foreign.verifying`` for what can be told about them.
    Not collective; reads the whole checkpoint once. What is wrong is reported, not raised.

    Raises:
        CheckpointNotFound: there is no checkpoint at ``path``.
        StoreUnusable: it is in an object store that does not answer.
    """
    path = place_of(path)
    folder = folder_of(path)
    if not is_file(folder / MANIFEST):
        from evermesh.checkpoint.foreign.verifying import verify_foreign

        return verify_foreign(path)
    try:
        manifest = read_manifest(path)
    except CheckpointCorrupt as error:
        return VerifyReport(path, (Problem("manifest", MANIFEST, error.fact),), 0, 0)
    sizes = store_of(folder).sizes(folder)
    extra = sorted(sizes.keys() - manifest.sizes.keys() - {MANIFEST})
    problems = [Problem("extra file", name, "the manifest does not list it") for name in extra] + _rules(manifest)
    as_they_are, mended = Indexes(folder, manifest, recovers=False), Indexes(folder, manifest)
    bytes_read = 0
    for rank, files in enumerate(manifest.ranks):
        problems += _check_index(as_they_are, mended, rank, sizes.keys())
        for name in sorted(files.files) if _is_known(mended, rank) else ():
            found, num_bytes = _check_file(mended, name, sizes.keys())
            problems += found
            bytes_read += num_bytes
    for part, entry in zip(manifest.parity_parts, manifest.parity.parts if manifest.parity else (), strict=True):
        problems += _check_parity(folder, part, entry, sizes.keys())
    return VerifyReport(path, tuple(problems), len(manifest.data_sizes), bytes_read)


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


def _rules(manifest: Manifest) -> list[Problem]:
    problems = []
    for name, tensor in manifest.tensors.items():
        try:
            tensor.check()
        except ShardMapInvalid as error:
            problems.append(Problem("coverage", MANIFEST, f"tensor {name} of shape {tensor.shape}: {error}"))
    return problems


def _check_index(as_it_is: Indexes, mended: Indexes, rank: int, there: Set[str]) -> list[Problem]:
    """Whether an index is what was saved, and lists what the rank had to write."""
    name = index_name(rank)
    try:
        index = as_it_is.of_rank(rank)
    except CheckpointCorrupt as error:
        kind: Kind = "index" if name in there else "missing file"
        return [Problem(kind, name, error.fact, repairable=_is_known(mended, rank))]
    wanted = Counter((part.name, part.region, part.start, part.stop) for part in as_it_is.plan.of_rank(rank))
    found = Counter((n, e.region, e.start, e.stop) for n, extents in index.extents.items() for e in extents)
    return [
        Problem("coverage", name, f"{n}{region}[{start}:{stop}] is there {count} times, {wanted[at]} by its rule")
        for at, count in sorted(((at, found[at]) for at in (wanted - found) | (found - wanted)), key=str)
        for n, region, start, stop in [at]
    ]


def _is_known(mended: Indexes, rank: int) -> bool:
    """Whether an index can be read, or made again."""
    try:
        mended.of_rank(rank)
    except CheckpointCorrupt:
        return False
    return True


def _check_file(mended: Indexes, name: str, there: Set[str]) -> tuple[list[Problem], int]:
    """The problems of one data file, and the bytes read to find them."""
    source = source_of(mended)
    plain = replace(source, recovery=None)
    try:
        reader = ChunkReader(plain, name)
    except CheckpointCorrupt as error:
        num_chunks = -(-source.files[name].num_bytes // CHUNK_BYTES)
        repairable = all(_is_mended(source, name, chunk) for chunk in range(num_chunks))
        kind: Kind = "size" if name in there else "missing file"
        return [Problem(kind, name, error.fact, repairable=repairable)], 0
    problems, buffer = [], np.empty(CHUNK_BYTES, np.uint8)
    with reader:
        reader.expect(range(reader.num_chunks))
        for chunk in range(reader.num_chunks):
            try:
                reader.read(chunk, buffer[: reader.size(chunk)])
            except CheckpointCorrupt as error:
                text = f"chunk {chunk}, bytes {error.start} to {error.stop}: {error.fact} ({'; '.join(error.elements)})"
                problems.append(Problem("checksum", name, text, repairable=_is_mended(source, name, chunk)))
    return problems, reader.bytes_read


def _is_mended(source: Source, name: str, chunk: int) -> bool:
    """Whether a chunk can be read, or made again."""
    if source.recovery is None:
        return False
    try:
        with ChunkReader(source, name) as reader:
            reader.read(chunk, np.empty(reader.size(chunk), np.uint8))
    except CheckpointCorrupt:
        return False
    return True


def _check_parity(folder: Place, part: ParityPart, expected: RankFiles, there: Set[str]) -> list[Problem]:
    """Whether a part of the parity is what was saved; it can be made again while the files that it protects are there."""
    problems = []
    try:
        index = index_of(folder / part.index_name, expected)
    except CheckpointCorrupt as error:
        kind: Kind = "index" if part.index_name in there else "missing file"
        return [Problem(kind, part.index_name, error.fact, repairable=isinstance(folder, Path))]
    sums = {part.name: StoredFile(expected.files[part.name], index.checksums[part.name])}
    try:
        with ChunkReader(Source(folder, "evermesh", {}, sums), part.name) as reader:
            for chunk in range(reader.num_chunks):
                reader.read(chunk, np.empty(reader.size(chunk), np.uint8))
    except CheckpointCorrupt as error:
        kind = "missing file" if part.name not in there else "checksum" if error.chunk is not None else "size"
        problems.append(Problem(kind, part.name, error.fact, repairable=isinstance(folder, Path)))
    return problems
