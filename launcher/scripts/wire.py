"""Lines of JSON between two launchers."""

import json
import socket
from contextlib import suppress
from typing import Any

_SEND_TIMEOUT_S = 10.0
_LONGEST = 1 << 20
"""Bytes of a line. Whoever sends more is not one of us."""
_KEEPALIVE_IDLE_S, _KEEPALIVE_PERIOD_S, _KEEPALIVE_PROBES = 5, 5, 3
"""A machine that vanished is noticed after some 20 s; a process that ended, at once."""


class Connection:
    """One end of a connection. Reading never waits."""

    def __init__(self, stream: socket.socket) -> None:
        self._socket = stream
        self._pending = b""
        self.is_lost = False
        """The other end is gone, or says what nobody of us would."""
        stream.settimeout(_SEND_TIMEOUT_S)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_PERIOD_S)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
        vanished_s = _KEEPALIVE_IDLE_S + _KEEPALIVE_PERIOD_S * _KEEPALIVE_PROBES
        stream.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * vanished_s
        )  # where nobody answers what we sent
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, kind: str, **fields: Any) -> None:
        """Send a message. If nobody takes it, the connection is lost."""
        try:
            self._socket.sendall(json.dumps({"kind": kind, **fields}).encode() + b"\n")
        except OSError:
            self.is_lost = True

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come."""
        try:
            content = self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            content = b""
        *lines, self._pending = (self._pending + content).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = []
            self.is_lost = True
        if not content or len(self._pending) > _LONGEST or not all(_is_message(message) for message in messages):
            self.is_lost = True
        return [message for message in messages if _is_message(message)]

    def wait_for_one(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message, and nothing of what follows it; None if the connection is lost instead.

        Raises:
            TimeoutError: nothing came.
        """
        self._socket.settimeout(timeout_s)
        line = b""
        while not line.endswith(b"\n") and len(line) < _LONGEST:
            byte = self._socket.recv(1)
            if not byte:
                return None
            line += byte
        self._socket.settimeout(_SEND_TIMEOUT_S)
        with suppress(ValueError):
            message = json.loads(line)
            return message if _is_message(message) else None
        return None

    def close(self, linger_s: float = 0.0) -> None:
        """Close it; wait so long for the other end to take what it was sent."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(linger_s)
            while linger_s and self._socket.recv(1 << 16):
                pass
        self._socket.close()


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("kind"), str)
