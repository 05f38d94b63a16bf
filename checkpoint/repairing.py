"""Writing lost and damaged files of a checkpoint again."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.encoding import index_payload
from evermesh.checkpoint.errors import CheckpointCorrupt, ParityUnusable
from evermesh.checkpoint.files import CHUNK_BYTES, sync_directory, write_checksummed
from evermesh.checkpoint.format import Manifest
from evermesh.checkpoint.indexed import Indexes, source_of
from evermesh.checkpoint.parity import ParityPart, Stripes, parity_blocks
from evermesh.checkpoint.reading import ChunkReader
from evermesh.checkpoint.stores.places import ObjectPath, Place, place_of
from evermesh.checkpoint.verifying import Problem, verify

_WRITING = ".repairing-"


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What ``repair`` did."""

    path: Path
    repaired: tuple[str, ...]
    """Files that were written again, and equal those that were saved."""
    left: tuple[Problem, ...]
    """What is still wrong."""


def repair(path: Place | str) -> RepairReport:
    """Write every file of a checkpoint again that is lost or damaged, as far as parity makes it possible.

    Not collective; nobody may save to the checkpoint meanwhile, but anybody may load it. Reads the whole checkpoint twice.
    A file takes its name when all of it is on the disk and equals what was saved; killed at any moment, nothing that was
    good is lost.

    Raises:
        CheckpointNotFound: there is no manifest at ``path``.
        ParityUnusable: it is in an object store.
    """
    path = place_of(path)
    if isinstance(path, ObjectPath):
        raise ParityUnusable(
            f"{path} is in an object store, where checkpoints have no parity to make lost files from: the store keeps every "
            "object in several places itself. Have it restore an older version of what is damaged, or load another step."
        )
    before = verify(path)
    for leftover in path.glob(f"{_WRITING}*"):
        leftover.unlink()
    if before.ok or any(problem.kind == "manifest" for problem in before.problems):
        return RepairReport(path, (), before.problems)
    manifest = read_manifest(path)
    damaged = {problem.file for problem in before.problems}
    repaired = [name for name in manifest.sizes if name in damaged and _rewrite(path, manifest, name)]
    sync_directory(path)
    return RepairReport(path, tuple(repaired), verify(path).problems)


def _rewrite(path: Path, manifest: Manifest, name: str) -> bool:
    """Whether a file could be made again; indexes come first (``Manifest.sizes``), so that data files have checksums."""
    indexes = Indexes(path, manifest)
    try:
        if name in indexes.owners:
            _replace(path, name, _chunks(indexes, name))
        elif name in manifest.parity_sizes:
            _rewrite_parity(path, manifest, name)
        else:
            _replace(path, name, iter([indexes.payload_of(indexes.rank_of_index(name))]))
    except (CheckpointCorrupt, OSError, EOFError):
        (path / f"{_WRITING}{name}").unlink(missing_ok=True)
        return False
    return True


def _chunks(indexes: Indexes, name: str) -> Iterator[memoryview]:
    """The chunks of a data file, each verified, and made again where it has to be."""
    buffer = np.empty(CHUNK_BYTES, np.uint8)
    with ChunkReader(source_of(indexes), name) as reader:
        for chunk in range(reader.num_chunks):
            reader.read(chunk, buffer[: reader.size(chunk)])
            yield buffer[: reader.size(chunk)].data


def _rewrite_parity(path: Path, manifest: Manifest, name: str) -> None:
    """Compute a part of the parity again, and its index with it."""
    part = next(part for part in manifest.parity_parts if name in (part.name, part.index_name))
    num_bytes, checksums = _write(path, part.name, _parity(path, manifest, part))
    payload = index_payload({part.name: (num_bytes, checksums)}, {}, {})
    _write(path, part.index_name, iter([payload]))
    for file in (part.name, part.index_name):
        os.rename(path / f"{_WRITING}{file}", path / file)


def _parity(path: Path, manifest: Manifest, part: ParityPart) -> Iterator[memoryview]:
    assert manifest.parity is not None
    members = Stripes(manifest.world_size, manifest.parity.width).members(part.stripe)
    return parity_blocks(path, part, [manifest.payload(rank) for rank in members])


def _replace(path: Path, name: str, payloads: "Iterator[memoryview] | Iterator[bytes]") -> None:
    _write(path, name, payloads)
    os.rename(path / f"{_WRITING}{name}", path / name)


def _write(path: Path, name: str, payloads: "Iterator[memoryview] | Iterator[bytes]") -> tuple[int, str]:
    (path / f"{_WRITING}{name}").unlink(missing_ok=True)
    return write_checksummed(path / f"{_WRITING}{name}", payloads)
