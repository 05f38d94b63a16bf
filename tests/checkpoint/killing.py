"""Processes that die at a chosen system call of a save: every call that changes the disk is a kill point."""

import io
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evermesh.checkpoint import latest, verify
from evermesh.checkpoint.stores.places import Place
from tests.checkpoint.states import load_and_compare, save_step

CHANGES_DISK = ("mkdir", "open", "write", "fsync", "rename", "link", "unlink", "rmdir")
OLD_STATE, NEW_STATE = 1, 2


@dataclass(frozen=True)
class Kill:
    """SIGKILL instead of call number ``call``, of all or of those ``of`` one name; ``half`` of the bytes are written first if
    it is a write."""

    call: int
    half: bool = False
    of: str | None = None


class _Raw(io.FileIO):
    """A file whose writes are calls of ``os``."""

    def write(self, payload: Any) -> int:
        """Write bytes."""
        return os.write(self.fileno(), payload)


class Calls:
    """Counts the calls of ``os`` that change the disk, and dies at one of them."""

    def __init__(self, kill: Kill | None) -> None:
        self.kill, self.names = kill, list[str]()
        self._one_at_a_time = threading.Lock()

    def install(self) -> None:
        """Put a counting wrapper around every call, for the rest of this process."""
        for name in CHANGES_DISK:
            setattr(os, name, self._wrap(name, getattr(os, name)))
        open_file = io.open

        def opened(path: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **keywords: Any) -> Any:
            if mode != "wb":
                return open_file(path, mode, buffering, *arguments, **keywords)
            raw = _Raw(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666), mode)
            return io.BufferedWriter(raw, buffering if buffering > 0 else io.DEFAULT_BUFFER_SIZE) if buffering else raw

        io.open = opened  # type: ignore[assignment]  # what ``Path.open`` calls

    def die(self) -> None:
        """What happens at the chosen call."""
        os.kill(os.getpid(), signal.SIGKILL)

    def _count(self) -> int:
        assert self.kill is not None
        return len(self.names) if self.kill.of is None else self.names.count(self.kill.of)

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            with self._one_at_a_time:
                if self.kill is not None and self.kill.of in (None, name) and self._count() == self.kill.call:
                    if self.kill.half and name == "write":
                        call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    self.die()
                self.names.append(name)
            return call(*arguments, **keywords)

        return counted


def die_at_every_call(base: Path, step: int, state: int, parity: int | None = None) -> list[tuple[str, Path]]:
    """Save in copies of ``base``, each time dying one call later; the calls, and the directories they left."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("forkserver").Process(
        target=_fork_for_every_call, args=(base, step, state, parity, sender)
    )
    process.start()
    sender.close()
    found: list[tuple[str, Path]] = receiver.recv()
    process.join()
    return found


def _fork_for_every_call(base: Path, step: int, state: int, parity: int | None, sender: Any) -> None:
    """In a process of one thread, so that forking it is safe and cheap."""
    directory, counted = _copy(base, "counted"), Calls(None)
    counted.install()
    save_step(directory, step, keep=1, state=state, parity=parity)
    names = list(counted.names)
    sender.send([(name, _die(base, call, name, step, state, parity)) for call, name in enumerate(names)])


def _die(base: Path, call: int, name: str, step: int, state: int, parity: int | None) -> Path:
    directory = _copy(base, f"killed-{call}")
    process = os.fork()
    if process == 0:
        try:
            Calls(Kill(call, half=name == "write")).install()
            save_step(directory, step, keep=1, state=state, parity=parity)
        finally:
            os._exit(0)  # not reached when killed in time
    _, status = os.waitpid(process, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL, f"call {call}, {name}, was not reached"
    return directory


def _copy(base: Path, name: str) -> Path:
    return Path(shutil.copytree(base, base.parent / name))


def state_of_latest(directory: Place) -> int:
    """Which of the two states the latest checkpoint holds, all of it."""
    path = latest(directory)
    assert path is not None
    assert verify(path).ok
    try:
        load_and_compare(path, OLD_STATE, 1)
    except AssertionError:
        load_and_compare(path, NEW_STATE, 1)
        return NEW_STATE
    return OLD_STATE


def next_save_works(directory: Path) -> None:
    """Another save puts everything in order."""
    path = save_step(directory, 3, keep=1)
    assert sorted(entry.name for entry in directory.iterdir()) == ["latest", path.name]
    assert latest(directory) == path
    load_and_compare(path, 3, 1)
