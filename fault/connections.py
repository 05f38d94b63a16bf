"""How the TCP connections of processes do, by the counters of the kernel, as ``ss`` of iproute2 tells them."""

import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

_WORDS = ("ss", "--tcp", "--info", "--extended", "--numeric", "--oneline", "--no-header", "state", "established")
_PATIENCE_S = 5.0
_NUMBER = re.compile(r"\b(ino|mss):(\d+)")
_TIMER = re.compile(r"timer:\(on,[^,]*,(\d+)\)")


class Connection(NamedTuple):
    """One end of an established connection."""

    local: str
    """Address and port, as ``ss`` writes them; at the other end it is ``remote``."""
    remote: str
    waiting_bytes: int
    """Sent, or to be sent, and not acknowledged. The kernel of the receiver acknowledges, whatever its process does."""
    resent: int
    """How often the oldest of them was sent again, without an answer."""
    segment_bytes: int
    """That are sent at once."""


def connections_of(pids: Sequence[int]) -> dict[int, list[Connection]]:
    """By process, those of each. One question for all processes in a network namespace; without ``ss`` there are none."""
    found: dict[int, list[Connection]] = {}
    by_namespace: dict[int, list[int]] = {}
    for pid in pids:
        with suppress(OSError):
            by_namespace.setdefault(os.stat(f"/proc/{pid}/ns/net").st_ino, []).append(pid)
    for namespace, inside in by_namespace.items():
        of_socket = {inode: pid for pid in inside for inode in _sockets(pid)}
        found.update({pid: [] for pid in inside})
        for inode, connection in _read(namespace, inside[0]):
            if inode in of_socket:
                found[of_socket[inode]].append(connection)
    return found


def _read(namespace: int, pid: int) -> Iterator[tuple[int, Connection]]:
    """All of a namespace with the numbers of their sockets."""
    own = os.stat("/proc/self/ns/net").st_ino
    words = _WORDS if namespace == own else ("nsenter", f"--net=/proc/{pid}/ns/net", *_WORDS)
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    for line in told.splitlines():
        fields = line.split()
        if len(fields) < 4 or not fields[1].isdigit():
            continue
        numbers = {name: int(value) for name, value in _NUMBER.findall(line)}
        resent = _TIMER.search(line)
        yield (
            numbers.get("ino", 0),
            Connection(
                local=fields[2],
                remote=fields[3],
                waiting_bytes=int(fields[1]),
                resent=int(resent[1]) if resent else 0,
                segment_bytes=numbers.get("mss", 0),
            ),
        )


def _sockets(pid: int) -> Iterator[int]:
    """Numbers of the sockets of a process."""
    folder = f"/proc/{pid}/fd"
    with suppress(OSError):
        for name in os.listdir(folder):
            with suppress(OSError):
                target = os.readlink(f"{folder}/{name}")
                if target.startswith("socket:["):
                    yield int(target[8:-1])
