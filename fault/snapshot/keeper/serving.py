"""The read service of a keeper: over TCP, ranks of other nodes take snapshots out of its memory. Nothing can be written.

Who connects says a hello (magic 8, xxh3-128 of the launch 16, nonce 32) and proves itself as ``handshake`` says. Requests
follow, a line of JSON each, of at most 4 KiB:

    what "inventory"                                                       the snapshots there are, as JSON
    what "data", "index", "objects": rank, slot, version, start, stop      bytes of a file of a slot
    what "layout": rank, version, start, stop                              of the layout whose group begins with the rank

A version is generation, step, digest of the map. An answer is a line of JSON with ``ok`` and the ``num_bytes`` that follow,
at most 8 MiB and fewer where the file ends; ``fact`` where it is refused, as when the slot holds something else by now.
"""

import json
import os
import socket
import socketserver
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from evermesh.fault.snapshot.handshake import NONCE_BYTES, Address, admit, receive
from evermesh.fault.snapshot.keeper.area import identity_in
from evermesh.fault.snapshot.keeper.layouts import groups_in, layout_file
from evermesh.fault.snapshot.keeper.slots import SlotFiles, held_by, ranks_in

MAGIC = b"EVMREAD1"
HELLO = struct.Struct(f"!8s16s{NONCE_BYTES}s")
MOST_BYTES = 8 << 20
"""Of one answer."""
MOST_LINE_BYTES = 4096
_HANDSHAKE_S, _IDLE_S = 5.0, 60.0
_MOST_CONNECTIONS = 256
"""At a time; further ones wait in the backlog."""
_ADDRESS = "service.json"
_LOOK_S = 0.2


class Refused(Exception):
    """What was asked for is not there, or not any more."""


class ReadService:
    """Serves ``area`` to those who know ``secret``, until it is closed; it listens when the constructor returns.

    Args:
        note: is told who came (1) and left (-1).

    Raises:
        OSError: nobody can listen on ``host``.
    """

    def __init__(self, area: Path, launch: str, host: str, secret: bytes, note: Callable[[int], None]) -> None:
        self.area, self.secret, self.note, self.host = area, secret, note, host
        self.launch = launch_digest(launch)
        self._server = _Server(self, _port_before(area, host))
        self.address = Address(host, self._server.server_address[1])
        found = identity_in(area)
        told = {"host": host, "port": self.address.port, "nonce": found.nonce if found is not None else ""}
        new = area / f"{_ADDRESS}.new"
        new.write_text(json.dumps(told))
        new.rename(area / _ADDRESS)
        threading.Thread(target=self._server.serve_forever, args=(_LOOK_S,), daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._server.is_closed = True
        self._server.shutdown()
        self._server.server_close()


def launch_digest(launch: str) -> bytes:
    """Of the launch whose snapshots are served."""
    return xxhash.xxh3_128_digest(launch.encode())


def address_in(area: Path) -> Address | None:
    """Where the keeper that lives in an area is reached by other nodes; None: it does not say, or nobody lives there."""
    found = identity_in(area)
    try:
        told = json.loads((area / _ADDRESS).read_bytes())
        is_of_it = found is not None and found.is_alive and told["nonce"] == found.nonce
        return Address(told["host"], told["port"]) if is_of_it else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def inventory_of(area: Path) -> dict[str, Any]:
    """What is in an area: who keeps it, the snapshots and the groups of ranks that left them."""
    found = identity_in(area)
    parts = [(held.number, held.state, held.record) for rank in ranks_in(area) for held in held_by(area, rank)]
    return {"nonce": found.nonce if found is not None else "", "parts": parts, "groups": groups_in(area)}


def _port_before(area: Path, host: str) -> int:
    """Of the keeper before this one, if it served the same address: others know it by that. 0: none."""
    with suppress(OSError, ValueError, LookupError, TypeError):
        told = json.loads((area / _ADDRESS).read_bytes())
        if told["host"] == host:
            return int(told["port"])
    return 0


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, service: ReadService, port: int) -> None:
        self.service, self.is_closed = service, False
        self.room = threading.Semaphore(_MOST_CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in service.host else socket.AF_INET
        try:
            super().__init__((service.host, port), _Connection)
        except OSError:
            if not port:
                raise
            super().__init__((service.host, 0), _Connection)

    def process_request(self, request: Any, client_address: Any) -> None:
        while not self.room.acquire(timeout=_LOOK_S):
            if self.is_closed:
                request.close()
                return
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self.room.release()


class _Connection(socketserver.StreamRequestHandler):
    server: _Server
    disable_nagle_algorithm = True

    def handle(self) -> None:
        service = self.server.service
        self.connection.settimeout(_HANDSHAKE_S)
        with suppress(OSError, struct.error):
            hello = receive(self.connection, HELLO.size)
            magic, launch, _ = HELLO.unpack(hello)
            if magic == MAGIC and launch == service.launch and admit(self.connection, hello, service.secret):
                service.note(1)
                try:
                    self._serve(service.area)
                finally:
                    service.note(-1)

    def _serve(self, area: Path) -> None:
        self.connection.settimeout(_IDLE_S)
        while line := self.rfile.readline(MOST_LINE_BYTES):
            try:
                content = _answer(area, json.loads(line))
            except (Refused, OSError, ValueError, LookupError, TypeError) as error:
                fact = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
                self._say({"ok": False, "fact": fact[:1000], "num_bytes": 0})
                continue
            self._say({"ok": True, "num_bytes": len(content)})
            self.connection.sendall(content)

    def _say(self, told: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(told).encode() + b"\n")


def _answer(area: Path, asked: dict[str, Any]) -> bytes | bytearray:
    if asked["what"] == "inventory":
        return json.dumps(inventory_of(area), separators=(",", ":")).encode()
    rank, (generation, step, shard_map) = int(asked["rank"]), asked["version"]
    start, stop = int(asked["start"]), int(asked["stop"])
    if not 0 <= start <= stop <= start + MOST_BYTES:
        raise Refused(f"bytes {start} to {stop} are not at most {MOST_BYTES:,} of a file")
    if asked["what"] == "layout":
        return _read(layout_file(area, int(generation), _digest(shard_map), rank), start, stop)
    number, version = int(asked["slot"]), (int(generation), int(step), _digest(shard_map))
    files = SlotFiles.of(area, rank, number)
    file = {"data": files.data, "index": files.index, "objects": files.objects}[asked["what"]]
    _check(area, rank, number, version)
    content = _read(file, start, stop)
    _check(area, rank, number, version)  # who writes to a slot says so before
    return content


def _digest(text: str) -> str:
    """The digest of a map, which is part of the name of a file. Raises ``ValueError``."""
    int(text, 16)
    if not text.isalnum():
        raise ValueError(f"{text[:100]!r} is no digest")
    return text


def _check(area: Path, rank: int, number: int, version: tuple[int, int, str]) -> None:
    held = next((held for held in held_by(area, rank) if held.number == number), None)
    if held is None or (held.record.generation, held.record.step, held.record.shard_map) != version:
        raise Refused(f"slot {number} of rank {rank} no longer holds step {version[1]} of attempt {version[0]}")


def _read(file: Path, start: int, stop: int) -> bytearray:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        content = bytearray(max(0, min(stop, os.fstat(descriptor).st_size) - start))
        view, at = memoryview(content), 0
        while at < len(content):
            num_bytes = os.preadv(descriptor, [view[at:]], start + at)
            if not num_bytes:
                raise Refused(f"{file.name} ends at byte {start + at:,}")
            at += num_bytes
        return content
    finally:
        os.close(descriptor)
