"""A way from one node to the controller that can be cut, or be bad: a proxy of this process, which the agent is told of.

    agent ── proxy ── controller

While it is cut nothing passes and nothing is closed: for both ends it looks like a network that is gone. What is under way
passes when it is mended, if anybody still waits for it. On a bad way everything comes, in order, but later.
"""

import random
import socket
import threading
import time
from contextlib import suppress
from urllib.parse import urlsplit

from evermesh.fault.injection import Delay
from evermesh.launcher.contact import forget_way, read_contact, write_way
from evermesh.launcher.run_directory import Run

_CHUNK_BYTES = 1 << 16
_CONNECT_S = 2.0


class Way:
    """The way of ``node`` to the controller of ``run``, from now until it is closed. Make it before the agent starts."""

    def __init__(self, run: Run, node: str) -> None:
        self._run, self._node = run, node
        self._is_whole = threading.Event()
        self._is_whole.set()
        self._delay: Delay | None = None
        self._chance = random.Random(node)
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        host, port = self._listener.getsockname()
        write_way(run.directory, node, f"http://{host}:{port}")
        threading.Thread(target=self._accept, name=f"way of {node}", daemon=True).start()

    def cut(self) -> None:
        """Let nothing pass."""
        self._is_whole.clear()

    def mend(self) -> None:
        """Let everything pass again."""
        self._is_whole.set()

    def worsen(self, delay: Delay | None) -> None:
        """Let everything pass as late as ``delay`` says; None: at once."""
        self._delay = delay

    def close(self) -> None:
        """End it: the agent finds the controller as any other does."""
        forget_way(self._run.directory, self._node)
        self.mend()
        self.worsen(None)
        for opened in (self._listener, *self._sockets):
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
            opened.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            self._is_whole.wait()
            far = self._connect()
            if far is None:
                near.close()
                continue
            self._sockets += (near, far)
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    def _wait_delay(self) -> None:
        """Of what a connection of TCP carries nothing is lost: what was, comes when it is sent again."""
        if (delay := self._delay) is not None:
            is_lost = self._chance.random() < delay.lost
            time.sleep(delay.seconds + (delay.again_s if is_lost else 0.0))

    def _connect(self) -> socket.socket | None:
        """A connection to the controller; None while there is none."""
        address = urlsplit(read_contact(self._run.directory) or "")
        with suppress(OSError):
            if address.hostname and address.port:
                return socket.create_connection((address.hostname, address.port), _CONNECT_S)
        return None

    def _pass_on(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):  # either end is closed
            one.settimeout(None)
            while received := one.recv(_CHUNK_BYTES):
                self._is_whole.wait()
                self._wait_delay()
                other.sendall(received)
        for opened in (one, other):
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)
