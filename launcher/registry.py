"""Which jobs of this user live on this machine: one small file per job, so that any terminal finds them.

$XDG_STATE_HOME/evermesh/jobs/PID-START-HOST.json (default ~/.local/state); its process writes it and takes it away. A
process is known by its number and the time of its start, since numbers are used again. The folder may be a home that
several machines and containers share: each looks only after its own.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["script", "run"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A job that lives."""

    kind: Kind
    name: str
    directory: str
    """Absolute: of the run, or of the logs of a script."""
    pid: int
    """Of the controller, or of the supervisor of a script: signals that ask for the end go there."""
    started_s: float
    """Wall clock, seconds since 1970."""
    command: tuple[str, ...]
    start_ticks: int
    """When the process started, as the kernel counts since boot."""
    host: str
    boot: str
    """Number of this life of the machine."""
    pid_namespace: str


def folder() -> Path:
    """Where the files are."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    return Path(state) / "evermesh/jobs"


@contextmanager
def register(
    kind: Kind, name: str, directory: Path, command: Sequence[str] = (), *, say: Callable[[str], None] | None = None
) -> Iterator[None]:
    """List this process as a living job inside the block.

    Where that cannot be written the job goes on, and ``say`` (default: print to the errors) is told once.
    """
    file: Path | None = None
    try:
        file = _write(_entry(kind, name, directory, command))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        told = f"evermesh: {name} cannot be listed among the living jobs ({error}); find it by its directory."
        (say or _print)(told)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                file.unlink()


def living() -> list[Entry]:
    """The jobs that live here, in no order. Files of processes that are gone are taken away."""
    try:
        files = list(folder().glob("*.json"))
    except (OSError, RuntimeError):
        return []
    found = []
    for file in files:
        entry = _read(file)
        if entry is None or entry.host != os.uname().nodename:
            continue
        if entry.boot == _boot() and entry.pid_namespace != _pid_namespace():
            continue  # another container's: its processes cannot be seen from here
        if entry.boot == _boot() and start_ticks(entry.pid) == entry.start_ticks:
            found.append(entry)
        else:
            with suppress(OSError):
                file.unlink()
    return found


def start_ticks(pid: int) -> int | None:
    """When a process started, in ticks since boot; None if it is gone, or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    fields = stat.rpartition(b")")[2].split()  # from the third on: the name before them may hold anything
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _entry(kind: Kind, name: str, directory: Path, command: Sequence[str]) -> Entry:
    pid = os.getpid()
    return Entry(
        kind=kind,
        name=name,
        directory=str(directory.absolute()),
        pid=pid,
        started_s=time.time(),
        command=tuple(command),
        start_ticks=start_ticks(pid) or 0,
        host=os.uname().nodename,
        boot=_boot(),
        pid_namespace=_pid_namespace(),
    )


def _write(entry: Entry) -> Path:
    """Readable by its owner only: a command line may hold secrets."""
    folder().mkdir(parents=True, exist_ok=True, mode=0o700)
    file = folder() / f"{entry.pid}-{entry.start_ticks}-{entry.host}.json"
    new = file.with_suffix(".new")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as output:
        json.dump(asdict(entry), output)
    new.rename(file)
    return file


def _read(file: Path) -> Entry | None:
    try:
        fields = json.loads(file.read_bytes())
        return Entry(**{**fields, "command": tuple(fields["command"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None  # gone meanwhile, or of another version


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")


def _print(text: str) -> None:
    print(text, file=sys.stderr)
