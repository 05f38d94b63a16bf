"""How two processes of a job show each other that they know its secret, and that neither repeats what it has heard.

Who dials sends a hello, which says what it wants and ends with a nonce. Numbers are big-endian, MAC is HMAC-SHA256 with the
secret over a label, the hello and the nonce of the acceptor:

    hello      what the protocol says, nonce 32
    challenge  nonce 32, MAC labelled "acceptor"
    proof      MAC labelled "dialer"

What follows is raw bytes, guarded by digests against accidents and not against somebody on the wire. Loads neither torch
nor numpy nor pydantic.
"""

import hmac
import secrets
import socket
import struct
from collections.abc import Callable
from typing import NamedTuple

NONCE_BYTES = 32
LEAST_SECRET_BYTES = 16
_CHALLENGE = struct.Struct("!32s32s")
_PROOF = struct.Struct("!32s")


class Address(NamedTuple):
    """Where somebody listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def new_nonce() -> bytes:
    """Bytes that nobody has seen before."""
    return secrets.token_bytes(NONCE_BYTES)


def listen(host: str, port: int = 0) -> socket.socket:
    """A socket that accepts on ``host`` only; port 0 takes a free one. Raises ``OSError`` as the system does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


def prove(connection: socket.socket, hello: bytes, secret: bytes, wait: Callable[[], None] | None = None) -> None:
    """Say ``hello`` and show that we know the secret, once the other end has. Blocks for as long as its timeout; ``wait``
    returns when there is an answer, or raises.

    Raises:
        ConnectionRefusedError: whoever is there does not know the secret. It has learnt nothing about ours.
        OSError: as the system does, also if the other end refuses us: it hangs up.
    """
    connection.sendall(hello)
    if wait is not None:
        wait()
    nonce, shown = _CHALLENGE.unpack(receive(connection, _CHALLENGE.size))
    if not hmac.compare_digest(shown, _mac(secret, b"acceptor", hello, nonce)):
        raise ConnectionRefusedError("whoever listens there does not know the secret")
    connection.sendall(_mac(secret, b"dialer", hello, nonce))


def admit(connection: socket.socket, hello: bytes, secret: bytes) -> bool:
    """Whether who said ``hello`` knows the secret; it sees that we do."""
    nonce = new_nonce()
    connection.sendall(_CHALLENGE.pack(nonce, _mac(secret, b"acceptor", hello, nonce)))
    return hmac.compare_digest(receive(connection, _PROOF.size), _mac(secret, b"dialer", hello, nonce))


def receive(connection: socket.socket, num_bytes: int) -> bytes:
    """So many bytes. Raises ``ConnectionResetError`` if the other end hangs up before."""
    found = b""
    while len(found) < num_bytes:
        part = connection.recv(num_bytes - len(found))
        if not part:
            raise ConnectionResetError("the connection was closed in the handshake")
        found += part
    return found


def _mac(secret: bytes, label: bytes, hello: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret, label + b"\0" + hello + nonce, "sha256")
