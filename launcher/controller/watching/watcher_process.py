"""The watcher of a job as its controller has it: a process that is told lines and says lines, and never waited for."""

import os
import queue
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from typing import BinaryIO

from pydantic import BaseModel

from evermesh.launcher.controller.watching.lines import FromWatcher, FromWatcherAdapter, Problem, Told

COMMAND = (sys.executable, "-m", "evermesh.launcher.controller.watching")
_SMALL = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
"""What the thread that listens allocates is freed by the one that thinks: with a heap for each, both would stay large."""
_MOST_BYTES = 256 << 20
"""That may wait for a watcher that is slower than agents are."""


class WatcherProcess:
    """One that runs. It ends with this process, or when it is told to."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **_SMALL}
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to_say: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._heard: deque[FromWatcher] = deque()
        self._said_bytes = self._written_bytes = 0
        threads = ((self._write, self._process.stdin), (self._read, self._process.stdout))
        self._threads = [threading.Thread(target=run, args=(pipe,), daemon=True) for run, pipe in threads]
        for thread in self._threads:
            thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it runs, and still says all that it has to say."""
        return self._process.poll() is None or bool(self._heard)

    @property
    def pid(self) -> int:
        return self._process.pid

    def say(self, line: BaseModel) -> None:
        """Tell it something."""
        self._put(line.model_dump_json().encode() + b"\n")

    def pass_on(self, node: str, text: str) -> None:
        """Tell it what the agent of a node says; nothing, where too much of that waits already."""
        if self._said_bytes - self._written_bytes < _MOST_BYTES:
            told = Told(node=node).model_dump_json()
            one_line = text.replace("\n", " ").replace("\r", " ")  # in JSON there are none inside of strings
            self._put(f"{told}\n{one_line}\n".encode())

    def heard(self) -> list[FromWatcher]:
        """What it has said since the last call."""
        return [self._heard.popleft() for _ in range(len(self._heard))]

    def end(self) -> None:
        """End it; returns when it is gone."""
        self._process.kill()
        self._process.wait()
        self._to_say.put(None)
        for thread in self._threads:
            thread.join()

    def _put(self, content: bytes) -> None:
        self._said_bytes += len(content)
        self._to_say.put(content)

    def _write(self, pipe: BinaryIO) -> None:
        with suppress(OSError), pipe:  # it may have ended
            while (content := self._to_say.get()) is not None:
                pipe.write(content)
                pipe.flush()
                self._written_bytes += len(content)

    def _read(self, pipe: BinaryIO) -> None:
        with pipe:
            for line in pipe:
                try:
                    self._heard.append(FromWatcherAdapter.validate_json(line))
                except ValueError as error:
                    self._heard.append(Problem(text=f"the watcher is not understood: {str(error)[:500]}"))
