"""The writer as its trainer sees it: a process that takes orders, and answers without ever being waited for."""

import json
import os
import select
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress

from evermesh.checkpoint.background.arena import Arena
from evermesh.checkpoint.background.orders import Answer, SaveOrder, WriterPlan

_MODULE = "evermesh.checkpoint.background.writer"
_END_S = 10.0
"""How long a writer without orders may take to end."""


class WriterProcess:
    """Started by the constructor, which does not wait for it. It ends with this process, or by ``close`` or ``kill``."""

    def __init__(self, plan: WriterPlan, arena: Arena) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", _MODULE, str(arena.descriptor)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
            pass_fds=(arena.descriptor,),
            bufsize=0,
        )
        assert self._process.stdout is not None
        self._poll = select.poll()
        self._poll.register(self._process.stdout, select.POLLIN)
        self._answers: deque[Answer] = deque()
        self._rest = b""
        self._has_ended = False
        self._send(plan.to_json())

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether it still takes orders."""
        return self._process.poll() is None

    def order(self, order: SaveOrder) -> None:
        """Have the arena written."""
        self._send(order.to_json())

    def answer(self, timeout_s: float) -> Answer | None:
        """The next answer, None if there is none within ``timeout_s``.

        Raises:
            ChildProcessError: it has ended, and has told everything.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self._answers:
            if self._has_ended:
                raise ChildProcessError(f"the process that writes the checkpoint has ended ({self._how()})")
            assert self._process.stdout is not None
            if not self._poll.poll(max(0.0, deadline_s - time.monotonic()) * 1000):
                return None
            self._take(os.read(self._process.stdout.fileno(), 1 << 16))
        return self._answers.popleft()

    def close(self) -> None:
        """End it when it has nothing to do."""
        self._close_pipes()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """End it at once; returns when it is gone."""
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def _send(self, line: bytes) -> None:
        assert self._process.stdin is not None
        view = memoryview(line)
        with suppress(BrokenPipeError):  # it has ended: the next look for an answer tells
            while view.nbytes:
                view = view[self._process.stdin.write(view) :]

    def _take(self, received: bytes) -> None:
        self._has_ended = self._has_ended or not received
        *lines, self._rest = (self._rest + received).split(b"\n")
        self._answers.extend(Answer(**json.loads(line)) for line in lines)

    def _how(self) -> str:
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "it only closed its pipe"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
