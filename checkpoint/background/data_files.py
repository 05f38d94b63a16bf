"""The data files of one rank: written from the arena with checksums, or linked where an older checkpoint holds the same.

A hard link is the whole of an incremental save: file systems count the names of a file, so deleting a checkpoint cannot
harm another, no crash can leave a wrong count, and every checkpoint is complete by itself. Two files are the same if their
bytes are: digests only tell where to look.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from evermesh.checkpoint.background.orders import WriterPlan
from evermesh.checkpoint.committing import data_name
from evermesh.checkpoint.encoding import safetensors_head
from evermesh.checkpoint.files import write_checksummed
from evermesh.checkpoint.stores.places import Place

_SLICE_BYTES = 16 << 20
_LEAST_FILE_BYTES = 64 << 20
MOST_FILES = 16
"""Of one rank in a checkpoint."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file of a checkpoint, and the parts of the arena that it holds."""

    parts: tuple[int, ...]
    """Indices, ascending."""
    name: str
    num_bytes: int
    checksums: str
    linked: bool
    """Whether an older checkpoint had it."""


@dataclass
class DataFiles:
    """Writes the arena of a rank into the directory of a checkpoint, again and again."""

    plan: WriterPlan
    arena: memoryview
    _previous: list[WrittenFile] = field(default_factory=list)
    _previous_path: Path | None = None
    _digests: list[bytes] = field(default_factory=list)

    def write(self, temporary: Place, committed: Place) -> list[WrittenFile]:
        """Fill ``temporary``, which will be renamed to ``committed``; return when all bytes are durable."""
        if not self.plan.parts:
            return []
        if not self.plan.incremental:
            return [self._write(temporary, data_name(self.plan.rank), tuple(range(len(self.plan.parts))))]
        digests = [xxhash.xxh3_128_digest(self._bytes_of(index)) for index in range(len(self.plan.parts))]
        assert isinstance(temporary, Path), "objects have no links"
        assert isinstance(committed, Path)
        files: list[WrittenFile] = []
        for parts, old in self._grouped(digests):
            name = data_name(self.plan.rank, len(files))
            linked = self._link(old, temporary / name) if old is not None else None
            files.append(linked or self._write(temporary, name, parts))
        self._previous, self._previous_path, self._digests = files, committed, digests
        return files

    def extents(self, files: Sequence[WrittenFile]) -> dict[str, list[dict[str, Any]]]:
        """Where the elements of every tensor are, as the manifest tells it."""
        extents: dict[str, list[dict[str, Any]]] = {}
        for file in files:
            offset = len(self._head(file.parts))
            for index in file.parts:
                part = self.plan.parts[index]
                place = {"file": file.name, "offset": offset, "region": part.region}
                extents.setdefault(part.name, []).append(place | {"start": part.start, "stop": part.stop})
                offset += part.num_bytes
        return extents

    def _grouped(self, digests: Sequence[bytes]) -> Iterator[tuple[tuple[int, ...], WrittenFile | None]]:
        """Which parts go into one file, and the older file that seems to be the same.

        What has changed goes into one file. What has not, of a file of which something has, gets a file of its own, so that
        the next save can link it.
        """
        if not self._previous:
            for parts in self._first_groups():
                yield parts, None
            return
        changed: list[int] = []
        apart: list[tuple[int, ...]] = []
        num_linked = 0
        for file in self._previous:
            same = tuple(index for index in file.parts if digests[index] == self._digests[index])
            if same == file.parts:
                num_linked += 1
                yield same, file
                continue
            changed += [index for index in file.parts if index not in set(same)]
            if same:
                apart.append(same)
        room = MOST_FILES - num_linked - 1
        for same in apart[max(room, 0) :]:
            changed += same
        for same in apart[: max(room, 0)]:
            yield same, None
        if changed:
            yield tuple(sorted(changed)), None

    def _first_groups(self) -> Iterator[tuple[int, ...]]:
        """Neighbours together, so that a part of the model that stays as it is has files of its own from the beginning."""
        offsets = self.plan.offsets
        least = max(_LEAST_FILE_BYTES, -(-offsets[-1] // MOST_FILES))
        first = 0
        for index in range(len(self.plan.parts)):
            if offsets[index + 1] - offsets[first] >= least or index + 1 == len(self.plan.parts):
                yield tuple(range(first, index + 1))
                first = index + 1

    def _link(self, old: WrittenFile, path: Path) -> WrittenFile | None:
        """A new name for the file of an older checkpoint, if that is still there and its bytes are those of the arena."""
        assert self._previous_path is not None
        try:
            os.link(self._previous_path / old.name, path)
        except OSError:  # deleted meanwhile, or a file system that has no links, or no more of them: it is written
            return None
        if self._is_same(path, old.parts):
            return WrittenFile(old.parts, path.name, old.num_bytes, old.checksums, linked=True)
        os.unlink(path)
        return None

    def _is_same(self, path: Path, parts: Sequence[int]) -> bool:
        with path.open("rb", buffering=0) as file:
            for payload in self._payloads(parts):
                view = memoryview(payload)
                while view.nbytes:
                    found = file.read(min(view.nbytes, 1 << 20))
                    if not found or found != view[: len(found)].tobytes():
                        return False
                    view = view[len(found) :]
            return not file.read(1)

    def _write(self, temporary: Place, name: str, parts: tuple[int, ...]) -> WrittenFile:
        num_bytes, checksums = write_checksummed(temporary / name, self._payloads(parts))
        return WrittenFile(parts, name, num_bytes, checksums, linked=False)

    def _payloads(self, parts: Sequence[int]) -> Iterator[memoryview | bytes]:
        """The bytes of a file: its head, then parts that follow each other in the arena together."""
        yield self._head(parts)
        offsets, at = self.plan.offsets, 0
        while at < len(parts):
            last = at
            while last + 1 < len(parts) and parts[last + 1] == parts[last] + 1:
                last += 1
            for begin in range(offsets[parts[at]], offsets[parts[last] + 1], _SLICE_BYTES):
                yield self.arena[begin : min(begin + _SLICE_BYTES, offsets[parts[last] + 1])]
            at = last + 1

    def _head(self, parts: Sequence[int]) -> bytes:
        return safetensors_head([self.plan.parts[index].entry for index in parts])

    def _bytes_of(self, index: int) -> memoryview:
        return self.arena[self.plan.offsets[index] : self.plan.offsets[index + 1]]
