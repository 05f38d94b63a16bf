"""A connection to the keeper of this node. Whoever trains never waits for an answer."""

import json
import select
import socket
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from evermesh.fault.snapshot.keeper.area import SOCKET
from evermesh.fault.snapshot.keeper.wire import is_own, line_of

_LOOK_S, _CONNECT_S = 0.01, 0.1


class KeeperLost(ConnectionError):
    """There is no keeper, or it does not take what it is told."""


class KeeperClient:
    """Connected when the constructor returns.

    Raises:
        KeeperLost: nobody listens, or somebody else's process does.
    """

    def __init__(self, area: Path, wait_s: float = 0.0) -> None:
        self._answers: deque[dict[str, Any]] = deque()
        self._rest = b""
        until_s = time.monotonic() + wait_s
        while True:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(_CONNECT_S)  # of a keeper that is stopped the queue may be full
            try:
                self._socket.connect(str(area / SOCKET))
                break
            except OSError as error:
                self._socket.close()
                if time.monotonic() >= until_s:
                    raise KeeperLost(f"no keeper listens in {area}: {error.strerror}") from error
                time.sleep(_LOOK_S)
        if not is_own(self._socket):
            self._socket.close()
            raise KeeperLost(f"{area / SOCKET} belongs to a process of another user")

    def ask(self, order: str, timeout_s: float, **values: Any) -> dict[str, Any]:
        """Give an order and return the answer. Raises ``KeeperLost``, also if there is none in time."""
        self._answers.clear()
        self.tell(order, timeout_s, **values)
        until_s = time.monotonic() + timeout_s
        while not self._answers:
            self._take(max(0.0, until_s - time.monotonic()))
            if not self._answers and time.monotonic() >= until_s:
                raise KeeperLost(f"the keeper did not answer {order!r} in {timeout_s:g} s")
        return self._answers.popleft()

    def tell(self, order: str, timeout_s: float = 0.1, **values: Any) -> None:
        """Give an order, whose answer ``answers`` yields. Raises ``KeeperLost`` if it is not taken in time."""
        self._socket.settimeout(timeout_s)
        try:
            self._socket.sendall(line_of({"order": order} | values))
        except OSError as error:
            raise KeeperLost(f"the keeper does not take {order!r}: {error}") from error

    def answers(self) -> list[dict[str, Any]]:
        """What it has answered by now. Raises ``KeeperLost`` if it has gone, and has said all."""
        if not self._answers:
            self._take(0.0)
        found = list(self._answers)
        self._answers.clear()
        return found

    @property
    def descriptor(self) -> int:
        """Readable when ``answers`` has something to say."""
        return self._socket.fileno()

    def close(self) -> None:
        """Leave."""
        with suppress(OSError):
            self._socket.close()

    def _take(self, timeout_s: float) -> None:
        if not select.select([self._socket], [], [], timeout_s)[0]:
            return
        try:
            received = self._socket.recv(1 << 16)
        except OSError as error:
            raise KeeperLost(f"the keeper has gone: {error}") from error
        if not received:
            raise KeeperLost("the keeper has gone")
        *lines, self._rest = (self._rest + received).split(b"\n")
        self._answers.extend(json.loads(line) for line in lines)
