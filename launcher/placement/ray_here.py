"""What can be seen of Ray without loading it: the cluster of this machine, and whether Ray has started this process."""

import os
import re
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

_SUBMISSION = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the entrypoint of ``ray job submit``, and for nothing else."""
_COPIES = "runtime_resources"
"""The folder in which Ray unpacks runtime environments, and removes them when nobody needs them any more."""
_PROBE_S = 1.0
RUNTIME_ENV = "EVERMESH_RAY_RUNTIME_ENV"
"""By which an agent tells a controller that it starts the runtime environment of the job, resolved, as JSON."""


def is_submission(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process belongs to the entrypoint of a ``ray job submit``."""
    return _SUBMISSION in environ


def is_in_copy(path: Path) -> bool:
    """Whether ``path`` is in a folder that Ray has unpacked on this node, and will remove."""
    return _COPIES in path.absolute().parts


def told_cluster(environ: Mapping[str, str] = os.environ) -> str | None:
    """HOST:PORT of the cluster that RAY_ADDRESS names; None: it names none, or where jobs are submitted (``http://...``)."""
    address = environ.get("RAY_ADDRESS", "")
    return address if re.fullmatch(r"[^/\s]+:\d+", address) else None


def cluster_of_this_machine(environ: Mapping[str, str] = os.environ) -> str | None:
    """HOST:PORT of the cluster that this machine has joined by ``ray start``, as long as its head answers."""
    folder = environ.get("RAY_TMPDIR") or environ.get("TMPDIR") or tempfile.gettempdir()
    with suppress(OSError, ValueError):  # also where the file is of another form than this: nothing is known then
        address = (Path(folder) / "ray" / "ray_current_cluster").read_text().strip()
        probe(address, _PROBE_S)
        return address
    return None


def lacks_token(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this machine is told to show a token (RAY_AUTH_MODE) and has none: Ray would abort the process."""
    if environ.get("RAY_AUTH_MODE", "").lower() != "token" or environ.get("RAY_AUTH_TOKEN"):
        return False
    return not Path(environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").is_file()


def finds_cluster(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether ``--on ray`` would find a cluster here, and Ray is installed."""
    if find_spec("ray") is None:
        return False
    return told_cluster(environ) is not None or cluster_of_this_machine(environ) is not None


def probe(address: str, timeout_s: float) -> None:
    """Return if somebody listens at HOST:PORT.

    Raises:
        OSError: nobody does.
        ValueError: it is no address.
    """
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
