"""What a keeper and those who ask it say: one JSON object per line over a Unix socket, between processes of one user."""

import json
import os
import socket
import struct
from typing import Any

_CREDENTIALS = struct.Struct("3i")
MOST_LINE_BYTES = 1 << 28


def line_of(message: dict[str, Any]) -> bytes:
    """A message as it is sent."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def is_own(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to this user, as the kernel says."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(packed)[1] == os.getuid())
