"""The folder in shared memory with the rings of the ranks of one node: locked by whoever starts them, swept after it.

/dev/shm/evermesh-rings-USER-NAME/  GENERATION-RANK.ring
                                    owner.json           what it belongs to

Rings outlive their ranks. They are copied into ``records`` of the run's directory when their generation is over, and when
the folder of an owner that was killed is swept.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import xxhash

from evermesh.checkpoint.background.memory import FOLDER
from evermesh.fault.recorder import ring_format as form
from evermesh.fault.recorder.ring import RingSpec
from evermesh.fault.snapshot.keeper.area import lock_of, locked

_PREFIX = "evermesh-rings"
_LOCK, _OWNER = "lock", "owner.json"
_NAME = re.compile(r"(\d+)-(\d+)\.ring")
KEPT = "records"
"""Folder in the directory of a run with copies of the rings of its last attempt."""


class RingFile(NamedTuple):
    """A ring, or a copy of one."""

    path: Path
    generation: int
    rank: int


class RingArea:
    """The folder of one node, made and locked; what killed owners have left is swept first.

    Args:
        directory: of the run, or of the logs of a script.
        node: name of the node.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, directory: Path, node: str) -> None:
        sweep_rings()
        self.directory, self.node = directory.absolute(), node
        digest = xxhash.xxh3_64_hexdigest(f"{self.directory}\0{node}\0{os.getpid()}".encode())
        self.path = FOLDER / f"{_PREFIX}-{os.getuid()}-{digest}"
        self._lock = locked(self.path, _LOCK)
        (self.path / _OWNER).write_text(json.dumps({"directory": str(self.directory), "node": node}))

    def spec(self, generation: int, rank: int, world_size: int) -> RingSpec:
        """What a rank is told of its ring, which it makes itself."""
        path = self.path / f"{generation}-{rank}.ring"
        return RingSpec(path, rank, world_size, generation, self.node, str(self.directory))

    def clear(self) -> None:
        """Remove all rings: a new generation begins."""
        for ring in rings_in(self.path):
            ring.path.unlink(missing_ok=True)

    def keep(self) -> None:
        """Copy the rings into the directory of the run; a full disk costs the copies and nothing else."""
        _keep(self.path, self.directory)

    def close(self) -> None:
        """Keep and remove all."""
        self.keep()
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def rings_in(folder: Path) -> list[RingFile]:
    """The rings of a folder, by generation and rank."""
    named = ((path, _NAME.fullmatch(path.name)) for path in folder.glob("*.ring"))
    found = [RingFile(path, int(match[1]), int(match[2])) for path, match in named if match]
    return sorted(found, key=lambda ring: (ring.generation, ring.rank))


def rings_of(directory: Path) -> list[RingFile]:
    """The newest ring of every rank of a run: those in shared memory of this machine, else the copies that were kept."""
    live = [ring for area in _areas() if _owner_of(area) == str(directory.absolute()) for ring in rings_in(area)]
    newest: dict[int, RingFile] = {}
    for ring in (*rings_in(directory / KEPT), *live):
        if ring.rank not in newest or ring.generation >= newest[ring.rank].generation:
            newest[ring.rank] = ring
    last = max((ring.generation for ring in newest.values()), default=0)
    return [ring for _, ring in sorted(newest.items()) if ring.generation == last]


def sweep_rings() -> list[Path]:
    """Remove the folders of this user that nobody holds, after their rings were copied; returns them."""
    swept = []
    for area in _areas():
        with suppress(OSError):
            descriptor = lock_of(area / _LOCK)
            if descriptor is None:
                continue
            try:
                owner = _owner_of(area)
                if owner is not None and Path(owner).is_dir():
                    _keep(area, Path(owner))
                shutil.rmtree(area, ignore_errors=True)
                swept.append(area)
            finally:
                os.close(descriptor)
    return swept


def _areas() -> Iterator[Path]:
    yield from FOLDER.glob(f"{_PREFIX}-{os.getuid()}-*")


def _owner_of(area: Path) -> str | None:
    try:
        return str(json.loads((area / _OWNER).read_bytes())["directory"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(area: Path, directory: Path) -> None:
    kept = directory / KEPT
    before = {ring.rank: ring for ring in rings_in(kept)}
    for ring in rings_in(area):
        with suppress(OSError):
            kept.mkdir(exist_ok=True)
            new = kept / f"{ring.path.name}.new"
            new.write_bytes(_used_part(ring.path))
            new.rename(kept / ring.path.name)
            old = before.get(ring.rank)
            if old is not None and old.generation < ring.generation:
                old.path.unlink(missing_ok=True)


def _used_part(ring: Path) -> bytes:
    """The bytes of a ring without the slots at its end that no record has lain in."""
    content = ring.read_bytes()
    used = len(content.rstrip(b"\0"))
    return content[: max(form.RECORDS_AT, used + -used % form.RECORD_BYTES)]
