"""Moves the bytes of a transfer: one thread, all connections at once, whatever can go on goes on.

What comes in and what goes out of a connection are generators, written as if there were only this connection. One that
cannot go on for now (its chunk is not yet there, its buffers are full) says so, and is asked again whenever bytes have
come or gone.
"""

import selectors
import socket
import threading
import time
from collections.abc import Generator, Mapping
from typing import TypeAlias

from evermesh.fault.snapshot.stripes.bandwidth import TokenBucket
from evermesh.fault.snapshot.stripes.errors import MemberLost, TransferGivenUp

Incoming: TypeAlias = Generator[memoryview | None, int, None]
"""Yields a buffer and is sent how many bytes came into it, at least one; or yields None: nothing can be taken for
now."""
Outgoing: TypeAlias = Generator[memoryview | None, None, None]
"""Yields bytes to send, all of them; or None: there is nothing for now."""

PIECE_BYTES = 1 << 18
"""Received or sent at a time: still in the cache of the core when it is hashed and added up."""
_TURN_BYTES = 1 << 20
"""Of one connection before the others have their turn."""
_LOOK_S = 0.1
"""How soon a transfer that was given up ends."""


class Pump:
    """Runs generators over connections, by rank of the member at the other end.

    A connection that takes no byte and brings none for ``timeout_s`` seconds while it should is lost. Another thread ends
    everything with ``given_up``.
    """

    def __init__(
        self,
        connections: Mapping[int, socket.socket],
        bucket: TokenBucket,
        timeout_s: float,
        given_up: threading.Event,
    ) -> None:
        self._connections, self._bucket, self._timeout_s = connections, bucket, timeout_s
        self._given_up = given_up

    def run(self, incoming: Mapping[int, Incoming], outgoing: Mapping[int, Outgoing]) -> None:
        """Return when all generators have ended.

        Raises:
            MemberLost: a connection was closed, or nothing moved for too long.
            TransferGivenUp: it was.
        """
        flows: list[_Flow] = []
        flows += [_Receiving(rank, self._connections[rank], stream) for rank, stream in incoming.items()]
        flows += [_Sending(rank, self._connections[rank], stream, self._bucket) for rank, stream in outgoing.items()]
        moved_s = time.monotonic()
        with selectors.DefaultSelector() as selector:
            watched: dict[int, int] = {}
            while flows := _unfinished(flows):
                if self._given_up.is_set():
                    raise TransferGivenUp("the transfer was given up.")
                delay_s = self._bucket.wait_s()
                self._watch(selector, watched, flows, may_send=delay_s == 0)
                ready = {key.fd: events for key, events in selector.select(min(delay_s or _LOOK_S, _LOOK_S))}
                turns = [flow for flow in flows if ready.get(flow.connection.fileno(), 0) & flow.event]
                if sum(flow.turn() for flow in turns):
                    moved_s = time.monotonic()
                elif time.monotonic() - moved_s > self._timeout_s:
                    ranks = sorted({flow.rank for flow in flows if flow.is_ready})
                    raise MemberLost(f"members {ranks} were silent for {self._timeout_s:.0f} s.", tuple(ranks))

    @staticmethod
    def _watch(
        selector: selectors.BaseSelector, watched: dict[int, int], flows: list["_Flow"], *, may_send: bool
    ) -> None:
        wanted = dict.fromkeys(watched, 0)
        for flow in flows:
            descriptor = flow.connection.fileno()
            wants = flow.is_ready and (may_send or flow.event == selectors.EVENT_READ)
            wanted[descriptor] = wanted.get(descriptor, 0) | (flow.event if wants else 0)
        for descriptor, events in wanted.items():
            before = watched.get(descriptor, 0)
            if events and not before:
                selector.register(descriptor, events)
            elif before and not events:
                selector.unregister(descriptor)
            elif events != before:
                selector.modify(descriptor, events)
            watched[descriptor] = events


def _unfinished(flows: list["_Flow"]) -> list["_Flow"]:
    """The flows that have not ended, after all that wait were asked until none of them can go on."""
    flows = [flow for flow in flows if not flow.has_ended]
    while sum(flow.goes_on() for flow in flows):  # what one does may be what another waits for
        flows = [flow for flow in flows if not flow.has_ended]
    return flows


class _Flow:
    """One direction of a connection."""

    event: int

    def __init__(self, rank: int, connection: socket.socket, stream: Incoming | Outgoing) -> None:
        self.rank, self.connection, self._stream = rank, connection, stream
        self._buffer: memoryview | None = None
        self.has_ended = False

    @property
    def is_ready(self) -> bool:
        """Whether there is something to move."""
        return self._buffer is not None

    def goes_on(self) -> bool:
        """Ask the generator to go on where it had to wait; whether it did, or has ended."""
        if self._buffer is not None:
            return False
        self._advance(None)
        return self.is_ready or self.has_ended

    def turn(self) -> int:
        """Move what can be moved without waiting, within limits; return how many bytes."""
        moved = 0
        while self._buffer is not None and moved < _TURN_BYTES:
            try:
                count = self._move(self._buffer[:PIECE_BYTES])
            except BlockingIOError:
                break
            except OSError as error:
                raise MemberLost(f"the connection to member {self.rank} broke: {error}", (self.rank,)) from error
            moved += count
            self._moved(count)
        return moved

    def _move(self, piece: memoryview) -> int:
        """Receive or send, once."""
        raise NotImplementedError

    def _moved(self, count: int) -> None:
        """Let the generator go on."""
        raise NotImplementedError

    def _advance(self, count: int | None) -> None:
        try:
            self._buffer = self._stream.send(count)  # type: ignore[arg-type]
        except StopIteration:
            self._buffer, self.has_ended = None, True


class _Receiving(_Flow):
    event = selectors.EVENT_READ

    def _move(self, piece: memoryview) -> int:
        count = self.connection.recv_into(piece)
        if count == 0:
            raise ConnectionResetError("it was closed")
        return count

    def _moved(self, count: int) -> None:
        self._advance(count)


class _Sending(_Flow):
    event = selectors.EVENT_WRITE

    def __init__(self, rank: int, connection: socket.socket, stream: Outgoing, bucket: TokenBucket) -> None:
        super().__init__(rank, connection, stream)
        self._bucket = bucket

    def _move(self, piece: memoryview) -> int:
        if self._bucket.wait_s():
            raise BlockingIOError
        return self.connection.send(piece)

    def _moved(self, count: int) -> None:
        self._bucket.take(count)
        assert self._buffer is not None, "something was sent"
        self._buffer = self._buffer[count:]
        if not self._buffer.nbytes:
            self._advance(None)
