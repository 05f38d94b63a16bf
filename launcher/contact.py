"""How the controller of a run is found: two files of the run's directory that only their owner can read.

controller.json         its address and process
controller-NODE.json    another way, by which one node reaches it, and the process that keeps that open
token                   what every request must show
"""

import hmac
import json
import os
import secrets
from pathlib import Path

import psutil

from evermesh.launcher.errors import ListenInvalid

_CONTACT = "controller.json"
_TOKEN = "token"
_SHORTEST_TOKEN = 32


def make_token(run: Path, given: Path | None = None) -> str:
    """The token of a run: what the file ``given`` holds, else one that is made at the first call; only its owner can read it.

    Raises:
        ListenInvalid: no token can be read from ``given``.
    """
    if given is not None:
        _write_token(run, _read_given(given))
    elif not (run / _TOKEN).is_file():
        _write_token(run, secrets.token_urlsafe(32))
    return read_token(run)


def _write_token(run: Path, token: str) -> None:
    new = run / f"{_TOKEN}.new"
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(token)
    os.replace(new, run / _TOKEN)  # on a full disk, or killed in between, there is none rather than an empty one


def _read_given(path: Path) -> str:
    try:
        token = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ListenInvalid(f"api.token_file {path} cannot be read: {error}. Make it: openssl rand -hex 32") from error
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ListenInvalid(
            f"api.token_file {path} holds no token of {_SHORTEST_TOKEN} letters and digits or more. "
            "Make one: openssl rand -hex 32"
        )
    return token


def read_token(run: Path) -> str:
    """The token of a run.

    Raises:
        OSError: there is none yet, or it belongs to somebody else.
    """
    return (run / _TOKEN).read_text().strip()


def keeper_secret(token: str, launch: str) -> bytes:
    """What the keepers of a launch, and those who read from them, show each other that they know."""
    return hmac.digest(token.encode(), b"keepers\0" + launch.encode(), "sha256")


def write_contact(run: Path, url: str) -> None:
    """Say where this process, the controller, is reached."""
    new = run / f"{_CONTACT}.new"
    new.write_text(json.dumps({"url": url, "pid": os.getpid()}) + "\n")
    os.replace(new, run / _CONTACT)


def write_way(run: Path, node: str, url: str) -> None:
    """Say by which other way ``node`` reaches the controller while this process, of the same machine, lives."""
    new = run / f"controller-{node}.json.new"
    new.write_text(json.dumps({"url": url, "pid": os.getpid()}) + "\n")
    os.replace(new, _way(run, node))


def forget_way(run: Path, node: str) -> None:
    """``node`` reaches the controller as all others do."""
    _way(run, node).unlink(missing_ok=True)


def read_contact(run: Path, node: str | None = None) -> str | None:
    """Where the controller was last reached, such as ``http://127.0.0.1:4321``, by ``node`` if it is one that asks.

    The controller may be gone since.
    """
    way = read_way(run, node) if node is not None else None
    if way is not None:
        return way
    try:
        return str(json.loads((run / _CONTACT).read_text())["url"])
    except (OSError, ValueError, KeyError):
        return None


def read_way(run: Path, node: str) -> str | None:
    """The way of its own by which ``node`` reaches the controller; None: it has none."""
    try:
        way = json.loads(_way(run, node).read_text())
        return str(way["url"]) if psutil.pid_exists(way["pid"]) else None
    except (OSError, ValueError, KeyError):
        return None


def _way(run: Path, node: str) -> Path:
    return run / f"controller-{node}.json"


def last_port(run: Path) -> int | None:
    """The port of the last controller, which the next one takes over if it can."""
    url = read_contact(run)
    return int(url.rpartition(":")[2]) if url else None
