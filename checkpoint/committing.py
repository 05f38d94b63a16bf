"""How a checkpoint becomes visible, and how it goes: names, commit, roll back and removal, all of it on one rank.

In a file system a directory becomes visible by one rename, after all its bytes are on the disk; in an object store, which
cannot rename, by one small object (``stores.attempts``). Needs nothing but the standard library and xxhash; ``directory``
draws what there is.
"""

import logging
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from evermesh.checkpoint.encoding import MANIFEST
from evermesh.checkpoint.files import LateFiles, sync_directory, write_durably
from evermesh.checkpoint.retention import Retention
from evermesh.checkpoint.stores import attempts
from evermesh.checkpoint.stores.attempts import STEP as STEP
from evermesh.checkpoint.stores.places import ObjectPath, Place
from evermesh.checkpoint.stores.store import objects_of, store_of

LATEST = "latest"
SAVING, REPLACED, REMOVING = ".saving-", ".replaced-", ".removing-"
_NEXT_LATEST = ".saving-latest"
_log = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """Name of the directory of a step."""
    return f"step-{step:08d}"


def step_of(path: Place) -> int:
    """The step that a directory is named after, set aside or not."""
    return int(path.name.rpartition("-")[2])


def data_name(rank: int, number: int = 0) -> str:
    """Name of a file of a rank; a rank that has several counts them."""
    return f"rank-{rank:05d}{f'-{number:02d}' if number else ''}.safetensors"


def index_name(rank: int) -> str:
    """Name of the index in which a rank tells what it has written."""
    return f"rank-{rank:05d}.index"


def temporary_path(directory: Path, step: int) -> Path:
    """Where the files of a step are written before they are committed."""
    return directory / f"{SAVING}{step_name(step)}"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One save: where it writes, and what that becomes."""

    directory: Place
    step: int
    identity: str
    """Unlike that of any other save, also of earlier jobs in the same directory; equal on all ranks."""

    @property
    def path(self) -> Place:
        """The checkpoint, once it is committed."""
        return self.directory / step_name(self.step)

    @property
    def files(self) -> Place:
        """The folder that its files are written to."""
        if isinstance(self.directory, Path):
            return temporary_path(self.directory, self.step)
        return self.directory / step_name(self.step) / f"{attempts.ATTEMPT}{self.identity}"

    @property
    def is_renamed(self) -> bool:
        """Whether its folder has one name for all attempts, and becomes the checkpoint by a rename."""
        return isinstance(self.directory, Path)


def prepare(attempt: Attempt) -> None:
    """Remove what killed saves have left, and make the folder of an attempt where folders are made."""
    if isinstance(attempt.directory, ObjectPath):
        attempts.reclaim(attempt.directory, attempt.identity)
        return
    directory = attempt.directory
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(directory.glob(f"{REPLACED}*")):
        committed = directory / leftover.name.removeprefix(REPLACED)
        if not committed.exists():
            os.rename(leftover, committed)  # killed between the two renames of a replacement
    for prefix in (REPLACED, SAVING, REMOVING):
        for leftover in sorted(directory.glob(f"{prefix}*")):
            _delete(leftover)
    temporary_path(directory, attempt.step).mkdir()


def put_index(attempt: Attempt, rank: int, payload: bytes) -> None:
    """Leave the index of a rank for the others, who see all of it or nothing; durable on return."""
    path = attempt.files / index_name(rank)
    if isinstance(path, ObjectPath):
        write_durably(path, [payload])
        return
    write_durably(path.with_suffix(".part"), [payload])
    os.rename(path.with_suffix(".part"), path)


def stage(attempt: Attempt, manifest: bytes, late: LateFiles) -> None:
    """Write what ``commit`` needs besides the files of the ranks: a full disk must show now."""
    late.write(attempt.files / MANIFEST, [manifest])
    if isinstance(attempt.directory, Path):
        late.write(attempt.directory / _NEXT_LATEST, [f"{step_name(attempt.step)}\n".encode()])


def commit(attempt: Attempt, aids: Iterable[str] = ()) -> None:
    """Make an attempt, which was staged, the checkpoint of its step and let ``latest`` name it.

    All its files are durable. ``aids`` are names of files beside them that are no part of the checkpoint: a file system
    has some, an object store none. A committed
    checkpoint of the same step is replaced: it stays what is found until the new one is.
    """
    if isinstance(attempt.directory, ObjectPath):
        path = attempt.directory / step_name(attempt.step)
        attempts.publish(path, attempt.identity)
        objects_of(path).put(attempt.directory / LATEST, f"{path.name}\n".encode())
        attempts.clear(path, attempt.identity)
        return
    temporary = temporary_path(attempt.directory, attempt.step)
    for name in aids:
        os.unlink(temporary / name)
    _rename(attempt.directory, temporary, attempt.directory / step_name(attempt.step))


def _rename(directory: Path, temporary: Path, path: Path) -> None:
    aside = directory / f"{REPLACED}{path.name}"
    sync_directory(temporary)
    if path.exists():
        os.rename(path, aside)
    os.rename(temporary, path)
    os.rename(directory / _NEXT_LATEST, directory / LATEST)
    # once for both: if only the second is kept, `latest` names what is missing, and the newest complete one is found
    sync_directory(directory)


def is_committed(attempt: Attempt) -> bool:
    """Whether it is the checkpoint of its step; only of an object store, a folder of a file system does not tell."""
    return isinstance(attempt.path, ObjectPath) and attempts.is_committed(attempt.path, attempt.identity)


def roll_back(attempt: Attempt) -> None:
    """After a save that failed: remove its files, and give a replaced checkpoint its name back."""
    if isinstance(attempt.directory, ObjectPath):
        attempts.roll_back(attempt.directory / step_name(attempt.step), attempt.identity)
        return
    directory, step = attempt.directory, attempt.step
    for leftover in (temporary_path(directory, step), directory / _NEXT_LATEST):
        _delete(leftover)
    aside = directory / f"{REPLACED}{step_name(step)}"
    if aside.exists() and not (directory / step_name(step)).exists():
        os.rename(aside, directory / step_name(step))


def retain(directory: Place, step: int, retention: Retention) -> None:
    """Remove the checkpoints that ``retention`` does not keep, after ``step`` was committed.

    A checkpoint that cannot be removed is logged, and removed by the next save: the save itself has succeeded.
    """
    try:
        paths = committed_steps(directory)
        kept = retention.kept_now({found: written_s(path) for found, path in paths.items()}, step)
        if isinstance(directory, Path):
            for leftover in sorted(directory.glob(f"{REPLACED}*")):
                _delete(leftover)
        remove(directory, sorted(paths.keys() - kept))
    except OSError as error:
        _log.warning("an old checkpoint in %s could not be removed: %s", directory, error)


def remove(directory: Place, steps: Iterable[int]) -> None:
    """Delete committed checkpoints. Killed at any moment, each is whole or gone, and the next save removes what is left."""
    for step in steps:
        if isinstance(directory, ObjectPath):
            attempts.remove(directory / step_name(step))
            continue
        # else what a killed replacement left would be found instead
        _delete(directory / f"{REPLACED}{step_name(step)}")
        hidden = directory / f"{REMOVING}{step_name(step)}"
        os.rename(directory / step_name(step), hidden)
        _delete(hidden)


def named_by_latest(directory: Place) -> str | None:
    """The step that ``latest`` names, as the name of its folder; None if there is none, or it is not legible.

    Raises:
        StoreUnusable: it is in an object store that does not answer.
    """
    try:
        payload = store_of(directory).read(directory / LATEST)
    except FileNotFoundError:
        return None
    except OSError:
        if isinstance(directory, ObjectPath):  # nobody knows
            raise
        return None
    name = payload.decode("ascii", "replace").strip()
    return name if STEP.fullmatch(name) else None


def committed_steps(directory: Place) -> dict[int, Place]:
    """The checkpoints that have the name of a step, complete or not, by step."""
    names = filter(STEP.fullmatch, store_of(directory).folders(directory))
    paths = {step_of(directory / name): directory / name for name in names}
    # in an object store such a name may be that of a save under way
    return {step: path for step, path in paths.items() if isinstance(path, Path) or attempts.is_checkpoint(path)}


def written_s(path: Place) -> float:
    """When a checkpoint was written, seconds since 1970, by the time of its manifest; 0 without one."""
    file = path / (MANIFEST if isinstance(path, Path) else attempts.COMMITTED)
    try:
        return store_of(file).written_s(file)
    except (FileNotFoundError, NotADirectoryError):
        return 0.0


def _delete(path: Path) -> None:
    if path.is_dir():
        with suppress(FileNotFoundError):  # somebody else removes it too
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
