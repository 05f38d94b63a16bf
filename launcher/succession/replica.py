"""What one agent remembers of terms, views and the journal, and how it answers. It obeys no term below the one it promised.

What it has said is on its disk before it says it: an agent that is killed and started again on its node keeps its word.
"""

import fcntl
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from evermesh.launcher.succession.copy import Chain, DiskCopy
from evermesh.launcher.succession.protocol import Answer, Append, Confirm, Install, Peek, Request, View, Vote

_LOCK_WAIT_S = 2.0
"""An agent that was killed may not be gone yet."""
_FOLDER = Path("/var/tmp")
"""On the disk of the node wherever one is; temporary only by name, it outlives the machine's end."""


class Word(BaseModel):
    """What a member has promised and accepted."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    """Digest of the run's token: a run that is made anew under the same name finds nothing of the one before."""
    identity: str
    launch: int = 0
    promised: int = 0
    view: View | None = None


class Memory(Protocol):
    """Where a member keeps its word and its copy of the journal; durable when a method returns."""

    @property
    def word(self) -> Word: ...

    @property
    def chain(self) -> Chain: ...

    def keep(self, word: Word) -> None:
        """Replace the word."""

    def write(self, after: int, lines: Sequence[str]) -> None:
        """Replace what is behind line ``after`` of the copy."""


class Replica:
    """One member. Any thread may ask it."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self.hears: Callable[[], bool] = lambda: False
        self.is_reviving: Callable[[], bool] = lambda: False

    @property
    def identity(self) -> str:
        return self._memory.word.identity

    @property
    def word(self) -> Word:
        return self._memory.word

    def answer(self, request: Request) -> Answer:
        """Do what is asked for, if it may be done, and say how things are then.

        Raises:
            OSError: it could not be written down; nothing was promised.
        """
        with self._lock:
            accepted = self._take(request)
            word = self._memory.word
            return Answer(
                identity=word.identity,
                accepted=accepted,
                launch=word.launch,
                promised=word.promised,
                length=len(self._memory.chain),
                view=word.view,
                hears=self.hears(),
                is_reviving=self.is_reviving(),
            )

    def _take(self, request: Request) -> bool:
        match request:
            case Peek():
                return True
            case Vote():
                word = self._memory.word
                if request.launch != word.launch or request.term <= word.promised:
                    return False
                self._memory.keep(word.model_copy(update={"promised": request.term}))
                return True
            case Confirm():
                return self._obeys(request.launch, request.term)
            case Install():
                return self._obeys(request.view.launch, request.view.term) and self._install(request.view)
            case Append():
                return self._obeys(request.launch, request.term) and self._append(request)

    def _obeys(self, launch: int, term: int) -> bool:
        """Whether the controller of this term is to be obeyed; a higher term than before is remembered first."""
        word = self._memory.word
        if (launch, term) < (word.launch, word.promised):
            return False
        if launch > word.launch:
            self._memory.keep(Word(run=word.run, identity=word.identity, launch=launch, promised=term))
        elif term > word.promised:
            self._memory.keep(word.model_copy(update={"promised": term}))
        return True

    def _install(self, view: View) -> bool:
        word = self._memory.word
        if word.view is not None and view.version < word.view.version:
            return False
        if view != word.view:
            self._memory.keep(word.model_copy(update={"view": view}))
        return True

    def _append(self, request: Append) -> bool:
        chain = self._memory.chain
        if request.after > len(chain) or chain.digest(request.after) != request.digest:
            return False
        known = chain.agreeing(request.after, request.lines)
        if known < len(request.lines):  # what is there and differs was never acknowledged by all
            self._memory.write(request.after + known, request.lines[known:])
        return True


class DiskMemory:
    """A memory in a folder of its node, for one agent at a time.

    Raises:
        OSError: another agent has it, there is no room, or others may write there.
    """

    def __init__(self, folder: Path, token: str) -> None:
        _make_private(folder)
        self.folder = folder
        self._lock = _locked(folder / "lock")
        run = xxhash.xxh3_128_hexdigest(token.encode())
        word = _read_word(folder / "member.json")
        if word is None or word.run != run:
            (folder / "copy.jsonl").unlink(missing_ok=True)
            word = Word(run=run, identity=secrets.token_hex(8))
        self._copy = DiskCopy(folder / "copy.jsonl")
        self.word: Word
        self.keep(word)

    @property
    def chain(self) -> Chain:
        return self._copy.chain

    def keep(self, word: Word) -> None:
        """Replace the word; on disk when this returns."""
        new = self.folder / "member.json.new"
        with new.open("w") as file:
            file.write(word.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.folder / "member.json")
        _sync_folder(self.folder)
        self.word = word

    def write(self, after: int, lines: Sequence[str]) -> None:
        """Replace what is behind line ``after``; on disk when this returns."""
        self._copy.write(after, lines)

    def close(self, *, job_is_over: bool) -> None:
        """Let the next agent of the node find it, or remove it."""
        self._copy.close()
        if job_is_over:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def folder_of(run: Path, node: str, folder: Path | None = None) -> Path:
    """Where ``node`` keeps what it remembers of ``run``; below ``folder``, or a place that every machine has of its own."""
    digest = xxhash.xxh3_64_hexdigest(f"{run.absolute()}\0{node}".encode())
    return (folder or _FOLDER / f"evermesh-{os.getuid()}") / f"journal-{digest}"


def _make_private(folder: Path) -> None:
    """Make ``folder``, for its owner alone; others may write into the one above that.

    Raises:
        PermissionError: somebody else has made it.
    """
    for path in (folder.parent, folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.parent.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or (found.st_mode & 0o022):
        raise PermissionError(
            f"{folder.parent} is for another user to write: copies of the journal would not be safe there. Give another "
            "place with --set journal_folder=DIR."
        )
    _sync_folder(folder.parent)


def _locked(path: Path) -> int:
    """The descriptor of a lock that no other process has; the kernel gives it back with this one."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until_s = time.monotonic() + _LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until_s:
                os.close(descriptor)
                raise
            time.sleep(0.05)
        else:
            return descriptor


def _read_word(path: Path) -> Word | None:
    try:
        return Word.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
