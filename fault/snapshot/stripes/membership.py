"""The connections of a stripe: one between every two members, each of which has proved that it knows the secret of the
job.

The member with the lower rank dials. It proves itself as ``handshake`` says, numbers are big-endian:

    hello      magic 8, stripe 16, generation 8, rank of the dialer 2, of the acceptor 2, nonce 32
    verdict    1 (welcome) or 0 (refused), generation of the acceptor 8

What follows is raw bytes, guarded by digests against accidents and not against somebody on the wire.
"""

import hashlib
import queue
import socket
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from evermesh.fault.snapshot.coding import Code
from evermesh.fault.snapshot.handshake import LEAST_SECRET_BYTES, Address, admit, new_nonce, prove, receive
from evermesh.fault.snapshot.stripes.errors import (
    MemberLost,
    StripesImpossible,
    TransferFailed,
    TransferGivenUp,
    WrongGeneration,
)

_MAGIC = b"EVMESH01"
_HELLO = struct.Struct("!8s16sQHH32s")
_VERDICT = struct.Struct("!BQ")
_RETRY_S = 0.05
_HANDSHAKE_S = 5.0
"""How long a stranger may keep a connection that says nothing."""
_MOST_STRANGERS = 64
"""Handshakes at a time; further connections wait in the backlog."""


@dataclass(frozen=True, slots=True)
class Membership:
    """A place in a stripe; all members have the same, but for the rank.

    Raises:
        StripesImpossible: there is not one address for every part of the code, no such rank, or a secret that can be
        guessed.
    """

    rank: int
    addresses: tuple[Address, ...]
    code: Code
    stripe: str
    """Name within the job."""
    generation: int
    """Of the attempt; members of another one are refused."""
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if len(self.addresses) != self.code.parts or not 0 <= self.rank < self.code.parts:
            raise StripesImpossible(
                f"member {self.rank} of {len(self.addresses)}, but code {self.code} has {self.code.parts} parts: "
                "give an address for each of them, and a rank below."
            )
        if len(self.secret) < LEAST_SECRET_BYTES:
            raise StripesImpossible(
                f"a secret of {len(self.secret)} bytes can be guessed; give at least {LEAST_SECRET_BYTES} random bytes."
            )

    @property
    def digest(self) -> bytes:
        """Of what members of a stripe have in common."""
        return hashlib.blake2b(f"{self.stripe}\0{self.code}".encode(), digest_size=16).digest()


def connect(
    mine: Membership,
    listener: socket.socket,
    absent: Iterable[int] = (),
    timeout_s: float = 30.0,
    given_up: threading.Event | None = None,
) -> dict[int, socket.socket]:
    """Connections to all other members but the ``absent``, by rank; non-blocking.

    Collective: all of them call it. Who does not know the secret is cut off and leaves no trace.

    Raises:
        TransferGivenUp: another thread has set ``given_up``.
        WrongGeneration: a member belongs to another one, and refused us.
        MemberLost: a member did not come within ``timeout_s``; names those that are missing.
    """
    deadline_s = time.monotonic() + timeout_s
    others = set(range(len(mine.addresses))) - {mine.rank, *absent}
    found: dict[int, socket.socket] = {}
    try:
        with _Acceptor(mine, listener, others, given_up or threading.Event()) as acceptor:
            for rank in sorted(other for other in others if other > mine.rank):
                found[rank] = _dial(mine, rank, deadline_s, acceptor.given_up)
            found |= acceptor.wait({other for other in others if other < mine.rank}, deadline_s)
    except BaseException:
        close_all(found)
        raise
    for connection in found.values():
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
    return found


def close_all(connections: Mapping[int, socket.socket]) -> None:
    """Close connections; the other ends notice."""
    for connection in connections.values():
        connection.close()


class _Acceptor:
    """Accepts in a thread, and lets a thread per connection ask who it is: a silent stranger delays nobody."""

    def __init__(
        self, mine: Membership, listener: socket.socket, expected: set[int], given_up: threading.Event
    ) -> None:
        self._mine, self._listener, self._expected, self.given_up = mine, listener, expected, given_up
        self._accepted: queue.Queue[tuple[int, socket.socket]] = queue.Queue()
        self._slots, self._is_closed = threading.Semaphore(_MOST_STRANGERS), threading.Event()
        self._wrong: dict[int, int] = {}
        self._thread = threading.Thread(target=self._accept, name="stripe-accept", daemon=True)

    def __enter__(self) -> "_Acceptor":
        self._listener.settimeout(_RETRY_S)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()
        self._thread.join()
        while not self._accepted.empty():
            self._accepted.get()[1].close()

    def wait(self, ranks: set[int], deadline_s: float) -> dict[int, socket.socket]:
        """The connections of ``ranks``; of one that connected twice the later, which has replaced the other."""
        found: dict[int, socket.socket] = {}
        while missing := ranks - set(found):
            left_s = max(deadline_s - time.monotonic(), 0)
            try:
                rank, connection = self._accepted.get(timeout=min(left_s, _RETRY_S))
            except queue.Empty:
                if left_s > 0 and not self.given_up.is_set():
                    continue
                close_all(found)
                raise self._missing(missing) from None
            if rank in found:
                found[rank].close()
            found[rank] = connection
        return found

    def _missing(self, missing: set[int]) -> TransferFailed:
        if self.given_up.is_set():
            return TransferGivenUp("the transfer was given up.")
        if wrong := {rank: self._wrong[rank] for rank in sorted(missing) if rank in self._wrong}:
            told = ", ".join(f"member {rank} is of generation {generation}" for rank, generation in wrong.items())
            return WrongGeneration(f"{told}; this is {self._mine.generation}.", tuple(wrong))
        ranks = ", ".join(map(str, sorted(missing)))
        return MemberLost(f"members {ranks} of stripe {self._mine.stripe!r} did not connect in time.", tuple(missing))

    def _accept(self) -> None:
        while not self._is_closed.is_set():
            if not self._slots.acquire(timeout=_RETRY_S):
                continue
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                self._slots.release()
                if not isinstance(error, TimeoutError):
                    self._is_closed.wait(_RETRY_S)  # out of descriptors, perhaps for a moment
                continue
            threading.Thread(target=self._greet, args=(connection,), name="stripe-greet", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        try:
            connection.settimeout(_HANDSHAKE_S)
            rank = self._authenticate(connection)
            if rank is None or self._is_closed.is_set():
                connection.close()
            else:
                self._accepted.put((rank, connection))
        except (OSError, struct.error):
            connection.close()
        finally:
            self._slots.release()

    def _authenticate(self, connection: socket.socket) -> int | None:
        """The rank at the other end, if it is welcome."""
        hello = receive(connection, _HELLO.size)
        magic, stripe, generation, rank, wanted, _ = _HELLO.unpack(hello)
        if magic != _MAGIC or stripe != self._mine.digest or wanted != self._mine.rank:
            return None
        if not admit(connection, hello, self._mine.secret) or rank not in self._expected:
            return None
        is_welcome = generation == self._mine.generation
        connection.sendall(_VERDICT.pack(is_welcome, self._mine.generation))
        if not is_welcome:
            self._wrong[rank] = generation
            return None
        return rank


def _dial(mine: Membership, rank: int, deadline_s: float, given_up: threading.Event) -> socket.socket:
    while True:
        if given_up.is_set():
            raise TransferGivenUp("the transfer was given up.")
        try:
            connection = socket.create_connection(mine.addresses[rank], timeout=_HANDSHAKE_S)
        except OSError as error:
            reason: Exception = error
        else:
            try:
                _prove(mine, rank, connection, given_up)
                return connection
            except WrongGeneration:
                connection.close()
                raise
            except OSError as error:
                connection.close()
                reason = error
        if time.monotonic() + _RETRY_S > deadline_s:
            host, port = mine.addresses[rank]
            raise MemberLost(
                f"member {rank} of stripe {mine.stripe!r} at {host}:{port} did not accept the connection: {reason}. "
                "If it runs, its secret or its stripe is another one.",
                (rank,),
            ) from reason
        time.sleep(_RETRY_S)


def _prove(mine: Membership, rank: int, connection: socket.socket, given_up: threading.Event) -> None:
    hello = _HELLO.pack(_MAGIC, mine.digest, mine.generation, mine.rank, rank, new_nonce())
    # whoever does something else for now leaves it in the backlog
    prove(connection, hello, mine.secret, lambda: _await_bytes(connection, given_up))
    is_welcome, generation = _VERDICT.unpack(receive(connection, _VERDICT.size))
    if not is_welcome:
        raise WrongGeneration(f"member {rank} is of generation {generation}; this is {mine.generation}.", (rank,))


def _await_bytes(connection: socket.socket, given_up: threading.Event) -> None:
    deadline_s = time.monotonic() + _HANDSHAKE_S
    connection.settimeout(_RETRY_S)
    while True:
        if given_up.is_set():
            raise TransferGivenUp("the transfer was given up.")
        try:
            connection.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            if time.monotonic() > deadline_s:
                raise
            continue
        connection.settimeout(_HANDSHAKE_S)
        return
