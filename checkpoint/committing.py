"""How a checkpoint becomes visible, and how it goes: names, commit, roll back and removal, all of it on one rank.

A directory becomes visible by one rename, after all its bytes are on the disk. Needs nothing but the standard library and
xxhash; ``directory`` draws what there is.
"""

import logging
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from evermesh.checkpoint.encoding import MANIFEST
from evermesh.checkpoint.files import sync_directory, write_durably
from evermesh.checkpoint.retention import Retention

LATEST = "latest"
SAVING, REPLACED, REMOVING = ".saving-", ".replaced-", ".removing-"
STEP = re.compile(r"step-(\d{8,})")
_NEXT_LATEST = ".saving-latest"
_log = logging.getLogger(__name__)


def step_name(step: int) -> str:
    """Name of the directory of a step."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
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


def prepare(directory: Path, step: int) -> Path:
    """Remove what killed saves have left, and make the temporary directory of a step."""
    directory.mkdir(parents=True, exist_ok=True)
    for leftover in sorted(directory.glob(f"{REPLACED}*")):
        committed = directory / leftover.name.removeprefix(REPLACED)
        if not committed.exists():
            os.rename(leftover, committed)  # killed between the two renames of a replacement
    for prefix in (REPLACED, SAVING, REMOVING):
        for leftover in sorted(directory.glob(f"{prefix}*")):
            _delete(leftover)
    temporary = temporary_path(directory, step)
    temporary.mkdir()
    return temporary


def commit(directory: Path, step: int) -> Path:
    """Make the temporary directory of a step a checkpoint and let ``latest`` name it.

    All files of the step are on the disk. A committed checkpoint of the same step is replaced: it is set aside, where
    ``latest`` still finds it, until the new one has its name.
    """
    temporary, path = temporary_path(directory, step), directory / step_name(step)
    aside = directory / f"{REPLACED}{path.name}"
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
    """After a save that failed: remove its files, and give a replaced checkpoint its name back."""
    for leftover in (temporary_path(directory, step), directory / _NEXT_LATEST):
        _delete(leftover)
    aside = directory / f"{REPLACED}{step_name(step)}"
    if aside.exists() and not (directory / step_name(step)).exists():
        os.rename(aside, directory / step_name(step))


def retain(directory: Path, step: int, retention: Retention) -> None:
    """Remove the checkpoints that ``retention`` does not keep, after ``step`` was committed.

    A checkpoint that cannot be removed is logged, and removed by the next save: the save itself has succeeded.
    """
    paths = committed_steps(directory)
    kept = retention.kept_now({found: written_s(path) for found, path in paths.items()}, step)
    try:
        for leftover in sorted(directory.glob(f"{REPLACED}*")):
            _delete(leftover)
        remove(directory, sorted(paths.keys() - kept))
    except OSError as error:
        _log.warning("an old checkpoint in %s could not be removed: %s", directory, error)


def remove(directory: Path, steps: Iterable[int]) -> None:
    """Delete committed checkpoints. Killed at any moment, each is whole or gone, and the next save removes what is left."""
    for step in steps:
        _delete(
            directory / f"{REPLACED}{step_name(step)}"
        )  # else what a killed replacement left would be found instead
        hidden = directory / f"{REMOVING}{step_name(step)}"
        os.rename(directory / step_name(step), hidden)
        _delete(hidden)


def committed_steps(directory: Path) -> dict[int, Path]:
    """The directories that have the name of a step, complete or not, by step."""
    return {step_of(path): path for path in directory.glob("step-*") if STEP.fullmatch(path.name)}


def written_s(path: Path) -> float:
    """When a checkpoint was written, seconds since 1970, by the time of its manifest; 0 without one."""
    try:
        return (path / MANIFEST).stat().st_mtime
    except OSError:
        return 0.0


def _delete(path: Path) -> None:
    if path.is_dir():
        with suppress(FileNotFoundError):  # somebody else removes it too
            shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
