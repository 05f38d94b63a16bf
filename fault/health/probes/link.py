"""A TCP connection between two nodes, or of a node with itself: latency, speed, and whether every byte arrives.

The end that listens admits only who knows the secret of this test (``fault/snapshot/handshake.py``).
"""

import socket
import struct
import threading
import time
from contextlib import suppress
from typing import NamedTuple

import xxhash

from evermesh.fault.health.verdicts import Verdict
from evermesh.fault.snapshot.handshake import NONCE_BYTES, Address, admit, listen, new_nonce, prove, receive

_CHUNK = 1 << 18
_HEAD = struct.Struct("!Q")
_DIGEST_BYTES = 16
_HELLO = b"evermesh link test "
_WAIT_S = 10.0


class LinkResult(NamedTuple):
    """What one connection did."""

    bytes_per_s: float = 0.0
    latency_s: float = 0.0
    """Half of the median time of a small message and its echo."""
    failed: str = ""
    """Why nothing is known of it."""


class LinkServer:
    """Serves tests at ``host``, in a thread, until it is closed. A context manager."""

    def __init__(self, host: str, secret: bytes) -> None:
        self._secret, self._socket = secret, listen(host)
        self.address = Address(host, self._socket.getsockname()[1])
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, name="link test", daemon=True)
        self._thread.start()

    def __enter__(self) -> "LinkServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Serve no more."""
        self._is_closed = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(_WAIT_S)

    def _serve(self) -> None:
        while not self._is_closed:
            with suppress(OSError):
                connection, _ = self._socket.accept()
                with connection:
                    connection.settimeout(_WAIT_S)
                    self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        hello = receive(connection, len(_HELLO) + NONCE_BYTES)
        if not hello.startswith(_HELLO) or not admit(connection, hello, self._secret):
            return
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_HEAD.unpack(receive(connection, _HEAD.size))[0]):
            connection.sendall(receive(connection, 1))
        digest, buffer = xxhash.xxh3_128(), bytearray(_CHUNK)
        while num_bytes := _HEAD.unpack(receive(connection, _HEAD.size))[0]:
            _receive_into(connection, memoryview(buffer)[:num_bytes])
            digest.update(memoryview(buffer)[:num_bytes])
            connection.sendall(b"!")
        connection.sendall(digest.digest())


def measure(address: Address, secret: bytes, budget_s: float = 0.5, pings: int = 50) -> LinkResult:
    """Connect to a server, and send for ``budget_s`` seconds; never raises for what the network does."""
    try:
        with socket.create_connection(address, timeout=_WAIT_S) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            prove(connection, _HELLO + new_nonce(), secret)
            latency_s = _ping(connection, pings)
            return _send(connection, budget_s, latency_s)
    except OSError as error:
        return LinkResult(failed=str(error) or type(error).__name__)


def probe_loopback(budget_s: float = 0.5) -> Verdict:
    """A connection of this node with itself: what the kernel's own part of the way costs."""
    secret = new_nonce()
    with LinkServer("127.0.0.1", secret) as server:
        found = measure(server.address, secret, budget_s)
    if found.failed:
        return Verdict("loopback", "bad", f"no connection to 127.0.0.1: {found.failed}", {}, "look at firewall rules")
    numbers = {"bytes_per_s": found.bytes_per_s, "latency_s": found.latency_s}
    fact = f"{found.bytes_per_s / 1e9:.2f} GB/s, {1e6 * found.latency_s:.0f} us"
    return Verdict("loopback", "ok", fact, numbers)


def _ping(connection: socket.socket, pings: int) -> float:
    connection.sendall(_HEAD.pack(pings))
    times = []
    for _ in range(pings):
        began_s = time.perf_counter()
        connection.sendall(b".")
        receive(connection, 1)
        times.append(time.perf_counter() - began_s)
    return sorted(times)[pings // 2] / 2


def _send(connection: socket.socket, budget_s: float, latency_s: float) -> LinkResult:
    """Every chunk is acknowledged, a few later: the other end has really taken it."""
    digest, chunk = xxhash.xxh3_128(), new_nonce() * (_CHUNK // NONCE_BYTES)
    sent = unconfirmed = 0
    began_s = time.perf_counter()
    while time.perf_counter() - began_s < budget_s:
        connection.sendall(_HEAD.pack(len(chunk)) + chunk)
        digest.update(chunk)
        sent, unconfirmed = sent + len(chunk), unconfirmed + 1
        if unconfirmed > 8:
            receive(connection, 1)
            unconfirmed -= 1
    receive(connection, unconfirmed)
    took_s = time.perf_counter() - began_s
    connection.sendall(_HEAD.pack(0))
    if receive(connection, _DIGEST_BYTES) != digest.digest():
        return LinkResult(sent / took_s, latency_s, f"of {sent:,} bytes some arrived wrong")
    return LinkResult(sent / took_s, latency_s)


def _receive_into(connection: socket.socket, view: memoryview) -> None:
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionResetError("the connection was closed in the middle")
        view = view[count:]
