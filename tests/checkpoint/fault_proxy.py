"""A TCP proxy in front of a store that fails as a schedule says: the weather between a cluster and its object store.

One fault per request, drawn from a seeded generator, so a failing run can be repeated. It speaks as much HTTP/1.1 as it takes
to see where requests and answers begin and end.
"""

import asyncio
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Self

Fault = Literal["delay", "503", "403", "cut answer", "cut request", "lose answer", "stall"]
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_EXPECT = re.compile(rb"\r\nexpect: *100-continue", re.IGNORECASE)
_BLOCK = 1 << 16
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_REFUSAL = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
_DENIED = (
    b"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
    % len(_REFUSAL)
) + _REFUSAL


@dataclass
class Weather:
    """Which requests fail, and how. Changed while the proxy runs."""

    rates: Mapping[Fault, float] = field(default_factory=dict)
    """Share of the requests that get a fault."""
    seed: int = 0
    choose: Callable[[str, str], Fault | None] | None = None
    """From method and target to the fault; instead of rates."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def fault(self, method: str, target: str) -> Fault | None:
        """What happens to the next request."""
        if self.choose is not None:
            return self.choose(method, target)
        drawn = self._random.random()
        for fault, rate in self.rates.items():
            if drawn < rate:
                return fault
            drawn -= rate
        return None


class _Cut(Exception):
    """The connection ends here."""


class FaultProxy:
    """Listens on a port of loopback and forwards to another, in a thread of its own. A context manager."""

    def __init__(self, port: int, weather: Weather | None = None) -> None:
        self._server_port, self.weather = port, weather or Weather()
        self.requests: list[tuple[str, str]] = []
        """Method and target of every request that came."""
        self.faults: Counter[Fault] = Counter()
        self.sent: Counter[str] = Counter()
        """Bytes of bodies that clients sent and got, by ``METHOD up`` and ``METHOD down``."""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    @property
    def url(self) -> str:
        """The endpoint that clients are told."""
        return f"http://127.0.0.1:{self.port}"

    def count(self, method: str, pattern: str = "") -> int:
        """Requests whose method it is and whose target has ``pattern``, a regular expression."""
        return sum(kind == method and re.search(pattern, target) is not None for kind, target in list(self.requests))

    def forget(self) -> None:
        """Count from zero."""
        self.requests.clear()
        self.faults.clear()
        self.sent.clear()

    async def _run(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.port: int = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection("127.0.0.1", self._server_port, limit=1 << 20)
        try:
            while await self._pass_on(client, to_client, server, to_server):
                pass
            to_client.close()
            await to_client.wait_closed()  # what is in buffers was promised
        except (_Cut, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            for writer in (to_client, to_server):
                writer.transport.abort()  # a reset: no polite end of what was cut

    async def _pass_on(
        self,
        client: asyncio.StreamReader,
        to_client: asyncio.StreamWriter,
        server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> bool:
        """One request and its answer; whether the connection goes on."""
        head = await client.readuntil(b"\r\n\r\n")
        method, target = head.split(b" ", 2)[0].decode(), head.split(b" ", 2)[1].decode()
        self.requests.append((method, target))
        fault = self.weather.fault(method, target)
        if fault is not None:
            self.faults[fault] += 1
        if fault == "delay":
            await asyncio.sleep(0.05)
        elif fault == "stall":
            await asyncio.sleep(3600)
        elif fault in ("503", "403"):
            if not _EXPECT.search(head):
                self._add(f"{method} up", await _body(head, client, None))
            to_client.write(_BUSY if fault == "503" else _DENIED)
            return False
        if _EXPECT.search(head):
            head = _EXPECT.sub(b"", head)
            to_client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        to_server.write(head)
        self._add(f"{method} up", await _body(head, client, to_server, cut=fault == "cut request"))
        await to_server.drain()
        answer = await server.readuntil(b"\r\n\r\n")
        if fault == "lose answer":  # the store has done what it was asked
            await _body(answer, server, None) if method != "HEAD" else None
            raise _Cut
        to_client.write(answer)
        is_empty = method == "HEAD" or b" 204 " in answer[:16] or b" 304 " in answer[:16]
        if not is_empty:
            self._add(f"{method} down", await _body(answer, server, to_client, cut=fault == "cut answer"))
        elif fault == "cut answer":
            raise _Cut
        await to_client.drain()
        return b"connection: close" not in answer.lower()

    def _add(self, what: str, num_bytes: int) -> None:
        self.sent[what] += num_bytes


async def _body(
    head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter | None, *, cut: bool = False
) -> int:
    """Pass on, or with no writer swallow, what comes after a head; half of it if it is ``cut``. Returns its bytes."""
    if _CHUNKED.search(head):
        return await _chunks(reader, writer, cut=cut)
    found = _LENGTH.search(head)
    length = int(found[1]) if found else 0
    left = length // 2 if cut else length
    while left:
        block = await reader.readexactly(min(left, _BLOCK))
        left -= len(block)
        if writer is not None:
            writer.write(block)
            await writer.drain()
    if cut:
        raise _Cut
    return length


async def _chunks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter | None, *, cut: bool) -> int:
    total = 0
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        rest = await reader.readexactly(size + 2) if size else await _trailer(reader)
        if cut:
            raise _Cut
        if writer is not None:
            writer.write(line + rest)
            await writer.drain()
        total += size
        if not size:
            return total


async def _trailer(reader: asyncio.StreamReader) -> bytes:
    lines = b""
    while not lines.endswith(b"\r\n\r\n") and lines != b"\r\n":
        lines += await reader.readuntil(b"\r\n")
    return lines
