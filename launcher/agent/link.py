"""The persistent connection of an agent to its controller: found, kept, and found again by a thread of its own."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from pydantic import BaseModel
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from evermesh.launcher.agent.loop import Loop

_RETRY_S = 0.1
_OPEN_TIMEOUT_S = 2.0
_PING_S = 1.0
"""A silent controller is given up after two of these."""


@dataclass(frozen=True, slots=True)
class LinkHooks:
    """What a link tells the agent, in the loop's thread."""

    connected: Callable[[], None]
    received: Callable[[str | bytes], None]
    lost: Callable[[], None]


class Link:
    """Keeps a WebSocket to whatever address ``find`` returns at the moment; None means: not known yet.

    Messages sent while there is no connection are dropped: the agent says all that matters again when it is connected.
    """

    def __init__(self, loop: Loop, node: str, token: str, find: Callable[[], str | None], hooks: LinkHooks) -> None:
        self._loop, self._node, self._token, self._find, self._hooks = loop, node, token, find, hooks
        self._connection: ClientConnection | None = None
        self._is_closed = threading.Event()
        self.lost_since_s: float | None = time.monotonic()
        """Monotonic clock; None while connected."""
        self._thread = threading.Thread(target=self._keep, name="link", daemon=True)
        self._thread.start()

    def send(self, message: BaseModel) -> None:
        """Send ``message``, or drop it where there is no connection."""
        connection = self._connection
        if connection is not None:
            try:
                connection.send(message.model_dump_json())
            except (WebSocketException, OSError):
                return  # the thread notices

    def drop(self) -> None:
        """Give the connection up, without a word, and look for another controller."""
        connection = self._connection
        if connection is not None:
            with suppress(OSError):  # it is gone
                connection.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection and keep it closed."""
        self._is_closed.set()
        connection = self._connection
        if connection is not None:
            connection.close()
        self._thread.join(_OPEN_TIMEOUT_S)

    def _keep(self) -> None:
        while not self._is_closed.is_set():
            url = self._find()
            if url is not None:
                self._serve(url)
            self._is_closed.wait(_RETRY_S)

    def _serve(self, url: str) -> None:
        try:
            with connect(
                f"{url.replace('http', 'ws', 1)}/api/agents/{self._node}",
                additional_headers={"Authorization": f"Bearer {self._token}"},
                open_timeout=_OPEN_TIMEOUT_S,
                ping_interval=_PING_S,
                ping_timeout=_PING_S,
                close_timeout=_PING_S,
                max_size=None,
                compression=None,
                proxy=None,
            ) as connection:
                self._connection, self.lost_since_s = connection, None
                self._loop.post(self._hooks.connected)
                for message in connection:
                    self._loop.post(lambda message=message: self._hooks.received(message))  # type: ignore[misc]
        except (WebSocketException, OSError, ValueError):
            pass  # not there, gone, or no address at all: tried again
        if self._connection is not None:
            self._connection, self.lost_since_s = None, time.monotonic()
            self._loop.post(self._hooks.lost)
