"""Processes that die at a chosen system call of a save: every call that changes the disk is a kill point."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.checkpoint.states import save_step

CHANGES_DISK = ("mkdir", "open", "write", "fsync", "rename", "unlink", "rmdir")


@dataclass(frozen=True)
class Kill:
    """SIGKILL instead of call number ``call``; ``half`` of the bytes are written first if it is a write."""

    call: int
    half: bool = False


class Calls:
    """Counts the calls of ``os`` that change the disk, and dies at one of them."""

    def __init__(self, kill: Kill | None) -> None:
        self.kill, self.names = kill, list[str]()

    def install(self) -> None:
        """Put a counting wrapper around every call, for the rest of this process."""
        for name in CHANGES_DISK:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            if self.kill is not None and len(self.names) == self.kill.call:
                if self.kill.half and name == "write":
                    call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            self.names.append(name)
            return call(*arguments, **keywords)

        return counted


def calls_of_a_save(directory: Path, step: int, state: int) -> list[str]:
    """Save in a process of its own and return its calls in order."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    _run(_save, directory, step, state, None, sender)
    names: list[str] = receiver.recv()
    return names


def save_and_die(directory: Path, step: int, state: int, kill: Kill) -> None:
    """Save in a process that dies on the way."""
    assert _run(_save, directory, step, state, kill, None) == -signal.SIGKILL


def _run(function: Callable[..., None], *arguments: Any) -> int | None:
    process = multiprocessing.get_context("forkserver").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def _save(directory: Path, step: int, state: int, kill: Kill | None, sender: Any) -> None:
    calls = Calls(kill)
    calls.install()
    save_step(directory, step, keep=1, state=state)
    names = list(calls.names)
    if sender is not None:
        sender.send(names)
