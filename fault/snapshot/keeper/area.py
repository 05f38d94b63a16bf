"""The folder of a keeper in shared memory: named after run and node, locked while it lives, swept when nobody does."""

import fcntl
import json
import os
import secrets
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import xxhash

from evermesh.checkpoint.background.memory import FOLDER, allocate
from evermesh.fault.snapshot.keeper.slots import HEADER_BYTES, NUM_SLOTS, SlotFiles

_PREFIX = "evermesh-keeper"
_LOCK, _AGENT, _IDENTITY, SOCKET = "lock", "agent", "keeper.json", "socket"
_ROOM, _GOING = "room", ".going"
_SWEEP_S, _LOOK_S = 0.5, 0.005
"""How long somebody who sweeps may hold a lock, and how often it is tried meanwhile."""


class Identity(NamedTuple):
    """Which process keeps an area. A number of a process may be another one's later, with its start time it may not."""

    pid: int
    started: int
    """Clock ticks from the start of the machine to that of the process."""
    nonce: str
    key: str
    """Of the launch that it keeps snapshots for."""

    @property
    def is_alive(self) -> bool:
        """Whether this very process runs."""
        return started_at(self.pid) == self.started


def area_of(run: Path, node: str) -> Path:
    """The folder of the keeper of ``node`` in the run with this directory."""
    digest = xxhash.xxh3_64_hexdigest(f"{run.absolute()}\0{node}".encode())
    return FOLDER / f"{_PREFIX}-{os.getuid()}-{digest}"


def identity_in(area: Path) -> Identity | None:
    """Who keeps, or has kept, an area; None if nobody has."""
    try:
        return Identity(**json.loads((area / _IDENTITY).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def started_at(pid: int) -> int | None:
    """When a process began, clock ticks since the machine did; None if it does not run."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


class Area:
    """The folder as its keeper holds it; what an earlier keeper of the same launch left there is kept. ``slots`` is how many
    each rank gets.

    Raises:
        BlockingIOError: another keeper holds it.
    """

    def __init__(self, path: Path, key: str, nonce: str, slots: int = NUM_SLOTS) -> None:
        self.path, self._numbers = path, range(slots)
        self._lock = locked(path, _LOCK)
        before = identity_in(path)
        if before is not None and before.key != key:
            for folder in (*path.glob("rank-*"), *path.glob("parity-*"), *path.glob("layouts")):
                shutil.rmtree(folder)
        identity = Identity(os.getpid(), started_at(os.getpid()) or 0, nonce, key)
        new = path / f"{_IDENTITY}.new"
        new.write_text(json.dumps(identity._asdict()))
        new.rename(path / _IDENTITY)

    def make_room(self, rank: int, data_bytes: int) -> None:
        """Give ``rank`` slots of so many bytes. Those that are so large stay as they are, with what they hold; others are
        made anew, empty.

        Raises:
            RoomMissing: there is no room; the rank has no slots then.
        """
        if self.room_of(rank) == data_bytes:
            return
        self.release(rank)
        try:
            for number in self._numbers:
                files = SlotFiles.of(self.path, rank, number)
                files.folder.mkdir(parents=True, mode=0o700)
                _make(files.header, HEADER_BYTES)
                if data_bytes:
                    _make(files.data, data_bytes)
            (files.folder.parent / _ROOM).write_text(str(data_bytes))
        except OSError:
            self.release(rank)
            raise

    def room_of(self, rank: int) -> int | None:
        """Bytes of the slots of ``rank``; None without slots, or if some of their memory is gone."""
        files = [SlotFiles.of(self.path, rank, number) for number in self._numbers]
        try:
            room = int((files[0].folder.parent / _ROOM).read_text())
            sizes = {one.header.stat().st_size for one in files} | {HEADER_BYTES}
            data = {one.data.stat().st_size for one in files} if room else {0}
        except (OSError, ValueError):
            return None
        return room if (sizes, data) == ({HEADER_BYTES}, {room}) else None

    def release(self, rank: int) -> None:
        """Give the memory of a rank back."""
        shutil.rmtree(SlotFiles.of(self.path, rank, 0).folder.parent, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder with all memory."""
        with suppress(OSError):
            _remove(self.path)
        os.close(self._lock)


class AgentMark:
    """Says that an area is wanted, also while no keeper lives: held by the agent of the node."""

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = locked(path, _AGENT)

    def close(self) -> None:
        """The area may be swept."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def sweep(root: Path = FOLDER) -> list[Path]:
    """Remove the areas of this user that neither a keeper nor an agent holds; returns them."""
    swept = []
    for path in root.glob(f"{_PREFIX}-{os.getuid()}-*"):
        with suppress(OSError):
            held = [lock_of(path / name) for name in (_LOCK, _AGENT)]
            try:
                if None not in held:
                    _remove(path)
                    swept.append(path)
            finally:
                for descriptor in held:
                    if descriptor is not None:
                        os.close(descriptor)
    return swept


def _remove(path: Path) -> None:
    """Remove an area of which the lock is held. Out of the way first: nobody may make a lock of his own in what is going."""
    going = path
    if path.suffix != _GOING:
        going = path.with_name(f"{path.name}-{secrets.token_hex(4)}{_GOING}")
        path.rename(going)
    shutil.rmtree(going)


def lock_of(file: Path) -> int | None:
    """Lock a file, which need not exist, and return its descriptor; None if somebody holds it."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def locked(path: Path, name: str) -> int:
    """Make the folder, which only this user may look into, and lock a file in it.

    Raises:
        BlockingIOError: another process holds the lock, for longer than one that sweeps.
    """
    until_s = time.monotonic() + _SWEEP_S
    while True:
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        with suppress(FileNotFoundError):  # swept in between: it is made again
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
                raise PermissionError(f"{path} is not a folder of user {os.getuid()} alone. Remove it.")
            descriptor = lock_of(path / name)
            if descriptor is None:
                if time.monotonic() > until_s:
                    raise BlockingIOError(f"{path / name} is held by another process")
                time.sleep(_LOOK_S)
            elif os.fstat(descriptor).st_nlink:
                return descriptor
            else:
                os.close(descriptor)


def _make(file: Path, num_bytes: int) -> None:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        allocate(descriptor, num_bytes)
    finally:
        os.close(descriptor)
