"""The keeper as the agent of its node sees it: started, or found where an earlier agent has started it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from evermesh.fault.process_state import ProcessState
from evermesh.fault.snapshot.handshake import LEAST_SECRET_BYTES, Address
from evermesh.fault.snapshot.keeper.answers import Answers
from evermesh.fault.snapshot.keeper.area import AgentMark, Identity, identity_in, sweep
from evermesh.fault.snapshot.keeper.client import KeeperClient, KeeperLost
from evermesh.fault.snapshot.keeper.serving import address_in
from evermesh.fault.snapshot.keeper.slots import NUM_SLOTS

_MODULE = "evermesh.fault.snapshot.keeper"
_ANSWER_S = 2.0
_LOOK_S = 0.005
IDLE_S = 60.0
"""How long a keeper waits for somebody to come."""


class KeeperProcess:
    """The keeper of ``area`` for a launch: it lives in a session of its own when the constructor returns, though it may not
    listen yet.

    One of an earlier launch is ended first. What nobody holds any more on this machine is swept. With a ``host``, other
    nodes that know the ``secret`` may read what it keeps, over TCP on this address. Ranks can write into two ``slots`` in
    turns; what is only rebuilt needs one.
    """

    def __init__(
        self,
        area: Path,
        key: str,
        log: Path,
        idle_s: float = IDLE_S,
        host: str | None = None,
        secret: bytes = b"",
        slots: int = NUM_SLOTS,
    ) -> None:
        if host is not None and len(secret) < LEAST_SECRET_BYTES:
            raise ValueError(f"a secret of {len(secret)} bytes can be guessed; give at least {LEAST_SECRET_BYTES}.")
        self.area, self._key, self._log, self._idle_s = area, key, log, idle_s
        self._host, self._secret, self._slots = host, secret, slots
        self._child: subprocess.Popen[bytes] | None = None
        self._client: KeeperClient | None = None
        self._answers = Answers()
        self.lost_because = ""
        """Why the one before the last was started again, in words."""
        self._mark = AgentMark(area)
        sweep()
        self.is_adopted = self._adopt()
        if not self.is_adopted:
            self._start()

    @property
    def identity(self) -> Identity | None:
        """Of the process that keeps the area now, if one does."""
        found = identity_in(self.area)
        return found if found is not None and found.is_alive else None

    @property
    def address(self) -> Address | None:
        """Where other nodes read from it; None: nowhere, or it does not listen yet."""
        return address_in(self.area)

    def look(self) -> bool:
        """Whether it lives and answers; else another one is started, for the same memory. Called now and then, does not wait
        for an answer: one that gives none for too long is killed."""
        self._connect()
        is_alive = self._child.poll() is None if self._child is not None else self.identity is not None
        self.lost_because = "it had died"
        found = self.identity if is_alive else None
        if found is not None and (wrong := self._answers.missing(found.pid)):
            self.lost_because = f"{wrong}, and was killed"
            self._kill(found)
            is_alive = False
        if not is_alive:
            self._start()
        return is_alive

    @property
    def told(self) -> dict[str, Any]:
        """What it answered last, to ``inventory``; empty before that."""
        return self._answers.last

    def end(self) -> None:
        """End it; its memory is gone when this returns."""
        found = self.identity
        with suppress(KeeperLost):
            client = KeeperClient(self.area)
            client.ask("end", _ANSWER_S)
            client.close()
        self._await_end(found)
        self._leave()
        sweep()

    def leave(self) -> None:
        """Let it live on without this agent."""
        self._leave()

    def _adopt(self) -> bool:
        """Whether a keeper of this launch lives, and is what its file says; one of another launch is ended."""
        found = self.identity
        if found is None:
            return False
        state = ProcessState.of(found.pid)
        if (
            state is not None and state.is_stopped
        ):  # its node froze: whoever waits for an answer is taken for frozen, too
            self._kill(found)
            return False
        try:
            client = KeeperClient(self.area, _ANSWER_S)
            told = client.ask("hello", _ANSWER_S)
            client.close()
        except KeeperLost:
            told = {}
        if found.key == self._key and told.get("nonce") == found.nonce:
            return True
        self._await_end(found, ask=True)
        return False

    def _await_end(self, found: Identity | None, *, ask: bool = False) -> None:
        if ask:
            with suppress(KeeperLost):
                client = KeeperClient(self.area)
                client.tell("end")
                client.close()
        until_s = time.monotonic() + _ANSWER_S
        while found is not None and found.is_alive and time.monotonic() < until_s:
            if self._child is not None:
                self._child.poll()
            time.sleep(_LOOK_S)
        if found is not None and found.is_alive:
            self._kill(found)
        if self._child is not None:
            self._child.wait(_ANSWER_S)
            self._child = None

    def _kill(self, found: Identity) -> None:
        with suppress(ProcessLookupError):
            os.kill(found.pid, signal.SIGKILL)
        if self._child is not None:
            with suppress(subprocess.TimeoutExpired):  # it waits for a disk
                self._child.wait(_ANSWER_S)

    def _start(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        self._answers = Answers()
        paths = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-P", "-m", _MODULE, str(self.area), self._key, str(self._idle_s), str(self._slots)]
        with self._log.open("ab") as output:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "PYTHONPATH": paths},
                start_new_session=True,
            )

    def _connect(self) -> None:
        """As long as an agent is connected the keeper is wanted."""
        if self._client is not None:
            try:
                self._answers.take(self._client)
            except KeeperLost:
                self._client.close()
                self._client, self._answers = None, Answers()
        if self._client is None:
            with suppress(KeeperLost):
                self._client = KeeperClient(self.area)
                if self._host is not None:
                    self._client.tell("serve", host=self._host, secret=self._secret.hex())

    def _leave(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
        self._mark.close()
