"""The data files of one rank: written from the arena with checksums, or linked where an older checkpoint holds the same.

A hard link is the whole of an incremental save: file systems count the names of a file, so deleting a checkpoint cannot
harm another, no crash can leave a wrong count, and every checkpoint is complete by itself. Two files are the same if their
bytes are, and only comparing them tells: what training changes differs in its first bytes, so that costs nothing.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evermesh.checkpoint.background.orders import WriterPlan
from evermesh.checkpoint.committing import data_name
from evermesh.checkpoint.encoding import extents_in_order, safetensors_head
from evermesh.checkpoint.files import write_checksummed
from evermesh.checkpoint.stores.places import Place

_SLICE_BYTES = 16 << 20
_FIRST_LOOK_BYTES, _LOOK_BYTES = 1 << 16, 1 << 20
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

    def write(self, temporary: Place, committed: Place) -> list[WrittenFile]:
        """Fill ``temporary``, which will be renamed to ``committed``; return when all bytes are durable."""
        if not self.plan.parts:
            return []
        if not self.plan.incremental:
            return [self._write(temporary, data_name(self.plan.rank), tuple(range(len(self.plan.parts))))]
        assert isinstance(temporary, Path), "objects have no links"
        assert isinstance(committed, Path)
        files: list[WrittenFile] = []
        for parts, old in self._grouped():
            name = data_name(self.plan.rank, len(files))
            linked = self._link(old, temporary / name) if old is not None else None
            files.append(linked or self._write(temporary, name, parts))
        self._previous, self._previous_path = files, committed
        return files

    def extents(self, files: Sequence[WrittenFile]) -> dict[str, list[dict[str, Any]]]:
        """Where the elements of every tensor are, as the manifest tells it."""
        extents: dict[str, list[dict[str, Any]]] = {}
        for file in files:
            parts = (self.plan.parts[index].placed for index in file.parts)
            for name, found in extents_in_order(file.name, len(self._head(file.parts)), parts).items():
                extents.setdefault(name, []).extend(found)
        return extents

    def _grouped(self) -> Iterator[tuple[tuple[int, ...], WrittenFile | None]]:
        """Which parts go into one file, and the older file that is the same.

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
            same = self._unchanged(file)
            if same is None:  # it is gone, or no longer what was written
                yield file.parts, None
                continue
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

    def _unchanged(self, old: WrittenFile) -> tuple[int, ...] | None:
        """The parts of the file of an older checkpoint whose bytes are those of the arena; None without such a file."""
        head = self._head(old.parts)
        try:
            with self._path_of(old).open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != old.num_bytes or file.read(len(head)) != head:
                    return None
                same, position = [], len(head)
                for index in old.parts:
                    if self._is_same(file.fileno(), position, self._bytes_of(index)):
                        same.append(index)
                    position += self.plan.parts[index].num_bytes
                return tuple(same)
        except OSError:
            return None

    def _is_same(self, descriptor: int, position: int, expected: memoryview) -> bool:
        begin, step = 0, _FIRST_LOOK_BYTES
        while begin < expected.nbytes:
            part = expected[begin : begin + step].tobytes()
            if os.pread(descriptor, len(part), position + begin) != part:
                return False
            begin, step = begin + len(part), _LOOK_BYTES
        return True

    def _link(self, old: WrittenFile, path: Path) -> WrittenFile | None:
        """A new name for the file of an older checkpoint, which is what the arena holds."""
        try:
            os.link(self._path_of(old), path)
        except OSError:  # deleted meanwhile, or a file system that has no links, or no more of them: it is written
            return None
        return WrittenFile(old.parts, path.name, old.num_bytes, old.checksums, linked=True)

    def _path_of(self, old: WrittenFile) -> Path:
        assert self._previous_path is not None
        return self._previous_path / old.name

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
