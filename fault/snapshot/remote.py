"""The memory of another node, read through the service of its keeper. Imports no torch."""

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from evermesh.checkpoint.stores.read_ahead import ReadAhead
from evermesh.fault.snapshot.handshake import Address, new_nonce, prove
from evermesh.fault.snapshot.keeper.serving import HELLO, MAGIC, MOST_BYTES, MOST_LINE_BYTES, launch_digest

_CONNECT_S = 3.0
"""How long a keeper may take to accept and to prove itself."""
_ANSWER_S = 30.0
_IN_FLIGHT = 4
"""Requests to one keeper at a time."""


class KeeperUnreachable(ConnectionError):
    """A keeper cannot be reached, does not know the secret, or does not have what was asked for any more."""


@dataclass(frozen=True)
class Keepers:
    """Where the snapshots of a job are, on all nodes."""

    addresses: tuple[Address, ...]
    """Of the keepers that other nodes reach; some may be gone."""
    launch: str
    """That the keepers serve."""
    secret: bytes = field(repr=False)


class RemoteKeeper:
    """Connects when something is asked for. May be used by several threads; ``close`` it.

    What it raises is ``KeeperUnreachable``.
    """

    def __init__(self, address: Address, launch: str, secret: bytes) -> None:
        self.address, self.bytes_received = address, 0
        self._launch, self._secret, self._pid = launch_digest(launch), secret, os.getpid()
        self._lock = threading.Lock()
        self._free: list[_Line] = []
        self._pool = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="keeper-read")

    def inventory(self) -> dict[str, Any]:
        """What its area holds."""
        found: dict[str, Any] = json.loads(self._ask({"what": "inventory"}))
        return found

    def read(self, asked: dict[str, Any], start: int, stop: int) -> bytes:
        """Bytes of a file, fewer where it ends; at most ``MOST_BYTES``."""
        return self._ask({**asked, "start": start, "stop": stop})

    def read_all(self, asked: dict[str, Any]) -> bytes:
        """All bytes of a file."""
        found = bytearray()
        while True:
            part = self.read(asked, len(found), len(found) + MOST_BYTES)
            found += part
            if len(part) < MOST_BYTES:
                return bytes(found)

    def open(self, asked: dict[str, Any], num_bytes: int) -> "RemoteFile":
        """A file that is so long."""
        return RemoteFile(self._pool, lambda start, stop: self._count(self.read(asked, start, stop)), num_bytes)

    def close(self) -> None:
        """Hang up."""
        self._pool.shutdown(cancel_futures=True)
        for line in self._free:
            line.close()
        self._free.clear()

    def _count(self, content: bytes) -> bytes:
        with self._lock:
            self.bytes_received += len(content)
        return content

    def _ask(self, asked: dict[str, Any]) -> bytes:
        try:
            with self._line() as line:
                return line.ask(asked)
        except (OSError, ValueError, LookupError) as error:
            if isinstance(error, KeeperUnreachable):
                raise
            raise KeeperUnreachable(f"the keeper at {self.address} cannot be read: {error}") from error

    @contextmanager
    def _line(self) -> "Iterator[_Line]":
        """A connection, which is kept if nothing went wrong."""
        with self._lock:
            line = self._free.pop() if self._free else None
        line = line or _Line(self.address, self._launch, self._secret)
        try:
            yield line
        except BaseException as error:
            if not isinstance(error, KeeperUnreachable):  # it answered: that it refuses
                line.close()
                raise
            with self._lock:
                self._free.append(line)
            raise
        with self._lock:
            self._free.append(line)


class RemoteFile:
    """A file in the memory of another node, as a source reads it."""

    def __init__(self, pool: ThreadPoolExecutor, fetch: Callable[[int, int], bytes], num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._pool, self._fetch = pool, fetch
        self._ahead: ReadAhead | None = None

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch these bytes, ascending, before they are read."""
        self.close()
        self._ahead = ReadAhead(self._pool, self._fetch, ranges)

    def read_at(self, position: int, buffers: Sequence[memoryview]) -> int:
        """Fill ``buffers`` with the bytes from ``position`` on; returns how many were read."""
        total = 0
        for buffer in buffers:
            rest = buffer
            while rest.nbytes:
                piece = self._ahead.piece(position + total) if self._ahead is not None else None
                if piece is None:
                    piece = memoryview(self._fetch(position + total, position + total + min(rest.nbytes, MOST_BYTES)))
                if not piece.nbytes:
                    raise EOFError(position + total)
                num_bytes = min(piece.nbytes, rest.nbytes)
                rest[:num_bytes] = piece[:num_bytes]
                rest, total = rest[num_bytes:], total + num_bytes
        return total

    def close(self) -> None:
        """Let go of it."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


class _Line:
    """A connection on which one asks at a time."""

    def __init__(self, address: Address, launch: bytes, secret: bytes) -> None:
        self._socket = socket.create_connection(address, timeout=_CONNECT_S)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            prove(self._socket, HELLO.pack(MAGIC, launch, new_nonce()), secret)
            self._socket.settimeout(_ANSWER_S)
            self._file = self._socket.makefile("rb", buffering=1 << 16)
        except BaseException:
            self._socket.close()
            raise

    def ask(self, asked: dict[str, Any]) -> bytes:
        self._socket.sendall(json.dumps(asked, separators=(",", ":")).encode() + b"\n")
        line = self._file.readline(MOST_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise ConnectionResetError("it hung up")
        told = json.loads(line)
        if not told["ok"]:
            raise KeeperUnreachable(str(told["fact"]))
        content = self._file.read(int(told["num_bytes"]))
        if len(content) != told["num_bytes"]:
            raise ConnectionResetError("it hung up in the middle of an answer")
        return content

    def close(self) -> None:
        with suppress(OSError, AttributeError):
            self._file.close()
        with suppress(OSError):
            self._socket.close()
