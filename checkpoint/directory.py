"""The directory that holds the checkpoints of a job: names, commit, retention, and what is in it.

    DIRECTORY/
    ├── latest                      text: the name of the newest committed step
    ├── step-00000010/              a committed checkpoint; never changed
    ├── .saving-step-00000020/      being written, or left by a killed save
    ├── .replaced-step-00000010/    set aside while a step is saved anew
    └── .removing-step-00000005/    being deleted

A directory becomes visible by one rename, after all its bytes are on the disk. One job at a time saves in a directory.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from evermesh.checkpoint.errors import CheckpointCorrupt, CheckpointNotFound
from evermesh.checkpoint.files import sync_directory, write_durably
from evermesh.checkpoint.format import MANIFEST, Manifest

LATEST = "latest"
_SAVING, _REPLACED, _REMOVING = ".saving-", ".replaced-", ".removing-"
_NEXT_LATEST = ".saving-latest"
_STEP = re.compile(r"step-(\d{8,})")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One checkpoint of a directory, as its manifest tells."""

    path: Path
    step: int
    time_s: float
    """When it was saved, seconds since 1970."""
    world_size: int
    num_bytes: int
    """Bytes of its data files."""
    num_tensors: int
    is_latest: bool


def step_name(step: int) -> str:
    """Name of the directory of a step."""
    return f"step-{step:08d}"


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointNotFound: there is none.
        CheckpointCorrupt: it is not what was saved.
    """
    try:
        payload = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFound(path, f"it has no {MANIFEST}") from error
    return Manifest.from_json(payload, path / MANIFEST)


def latest(directory: Path | str) -> Path | None:
    """The checkpoint to resume from, or None: the one that ``latest`` names; if that is missing or incomplete, the
    newest complete one. Checks the manifest and the sizes of files, not their checksums."""
    named = _named_by_latest(Path(directory))
    if named is not None and _is_complete(named):
        return named
    return next((path for path in reversed(_step_paths(Path(directory))) if _is_complete(path)), None)


def checkpoints(directory: Path | str) -> list[CheckpointInfo]:
    """The complete checkpoints of a directory, by step. Incomplete ones are left out."""
    newest = latest(directory)
    return [_info(path, newest) for path in _step_paths(Path(directory)) if _is_complete(path)]


def prepare(directory: Path, step: int) -> Path:
    """Remove what killed saves have left, and make the temporary directory of a step. On one rank."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(directory.glob(f"{_REPLACED}*")):
        committed = directory / leftover.name.removeprefix(_REPLACED)
        if not committed.exists():
            os.rename(leftover, committed)  # killed between the two renames of a replacement
    for prefix in (_REPLACED, _SAVING, _REMOVING):
        for leftover in sorted(directory.glob(f"{prefix}*")):
            _delete(leftover)
    temporary = temporary_path(directory, step)
    temporary.mkdir()
    return temporary


def temporary_path(directory: Path, step: int) -> Path:
    """Where the files of a step are written before they are committed."""
    return directory / f"{_SAVING}{step_name(step)}"


def commit(directory: Path, step: int) -> Path:
    """Make the temporary directory of a step a checkpoint and let ``latest`` name it. On one rank.

    All files of the step are on the disk. A committed checkpoint of the same step is replaced: it is set aside, where
    ``latest`` still finds it, until the new one has its name.
    """
    temporary, path = temporary_path(directory, step), directory / step_name(step)
    aside = directory / f"{_REPLACED}{path.name}"
    write_durably(directory / _NEXT_LATEST, [f"{path.name}\n".encode()])  # before the rename: a full disk must show now
    sync_directory(temporary)
    if path.exists():
        os.rename(path, aside)
    os.rename(temporary, path)
    sync_directory(directory)
    os.rename(directory / _NEXT_LATEST, directory / LATEST)
    sync_directory(directory)
    return path


def roll_back(directory: Path, step: int) -> None:
    """After a save that failed: remove its files, and give a replaced checkpoint its name back. On one rank."""
    for leftover in (temporary_path(directory, step), directory / _NEXT_LATEST):
        _delete(leftover)
    aside = directory / f"{_REPLACED}{step_name(step)}"
    if aside.exists() and not (directory / step_name(step)).exists():
        os.rename(aside, directory / step_name(step))


def retain(directory: Path, step: int, keep: int | None) -> None:
    """Remove the checkpoints that ``retained`` does not keep, after ``step`` was committed. On one rank.

    A checkpoint that cannot be removed is logged, and removed by the next save: the save itself has succeeded.
    """
    paths = {_step_of(path): path for path in _step_paths(directory) if path.name.startswith("step-")}
    kept = retained(paths, step, keep)
    try:
        for leftover in sorted(directory.glob(f"{_REPLACED}*")):
            _delete(leftover)
        for old in sorted(paths.keys() - kept):
            hidden = directory / f"{_REMOVING}{paths[old].name}"
            os.rename(paths[old], hidden)
            _delete(hidden)
    except OSError as error:
        _log.warning("an old checkpoint in %s could not be removed: %s", directory, error)


def retained(steps: Iterable[int], step: int, keep: int | None) -> set[int]:
    """The steps to keep: the ``keep`` newest up to ``step``, which is always one; None keeps all.

    Steps above ``step`` come from a run that was taken back; they count as the oldest.
    """
    order = sorted(steps, key=lambda s: (s > step, -s))
    return set(order if keep is None else order[: max(keep, 1)])


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _named_by_latest(directory: Path) -> Path | None:
    try:
        name = (directory / LATEST).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    if not _STEP.fullmatch(name):
        return None
    path = directory / name
    return path if path.exists() else directory / f"{_REPLACED}{name}"


def _step_paths(directory: Path) -> list[Path]:
    """Step directories by step, and those set aside where the step itself is missing."""
    found = {path.name: path for path in directory.glob(f"{_REPLACED}step-*")}
    found = {name.removeprefix(_REPLACED): path for name, path in found.items()}
    found |= {path.name: path for path in directory.glob("step-*")}
    return sorted((path for name, path in found.items() if _STEP.fullmatch(name)), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _is_complete(path: Path) -> bool:
    try:
        files = read_manifest(path).files
        return all((path / name).stat().st_size == file.num_bytes for name, file in files.items())
    except (CheckpointCorrupt, OSError):
        return False


def _info(path: Path, newest: Path | None) -> CheckpointInfo:
    manifest = read_manifest(path)
    return CheckpointInfo(
        path=path,
        step=manifest.step,
        time_s=manifest.time_s,
        world_size=manifest.world_size,
        num_bytes=manifest.num_bytes,
        num_tensors=len(manifest.tensors),
        is_latest=path == newest,
    )
