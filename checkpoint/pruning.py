"""Removing checkpoints by a policy, at any time and from outside the job."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from evermesh.checkpoint import committing
from evermesh.checkpoint.directory import latest
from evermesh.checkpoint.errors import CheckpointNotFound
from evermesh.checkpoint.retention import Retention
from evermesh.checkpoint.stores.places import ObjectPath, Place, place_of
from evermesh.checkpoint.stores.store import store_of


@dataclass(frozen=True, slots=True)
class Pruning:
    """What a policy keeps and removes of a directory."""

    directory: Place
    kept: tuple[int, ...]
    """Steps, ascending; that of ``latest`` is always one."""
    removed: tuple[int, ...]
    bytes_freed: int
    """On the disk. A file that a kept checkpoint also names, by a hard link, frees nothing."""


def prune(directory: Place | str, retention: Retention, *, dry_run: bool = True) -> Pruning:
    """Remove the checkpoints that ``retention`` does not keep; with ``dry_run`` only tell which.

    The checkpoint to resume from always stays. Killed at any moment, every checkpoint is whole or gone. A job that saves
    in the directory meanwhile is not disturbed.

    Raises:
        CheckpointNotFound: there is no complete checkpoint, so nothing that a removal could leave.
    """
    directory = place_of(directory)
    newest = latest(directory)
    if newest is None:
        raise CheckpointNotFound(directory, "no complete checkpoint; nothing was removed")
    paths = committing.committed_steps(directory)
    step = committing.step_of(newest)
    written_s = {found: committing.written_s(path) for found, path in paths.items()}
    kept = retention.kept_now(written_s, step) | {step}
    removed = sorted(paths.keys() - kept)
    bytes_freed = _bytes_freed(paths[found] for found in removed)
    if not dry_run:
        committing.remove(directory, removed)
    return Pruning(directory, tuple(sorted(kept & paths.keys())), tuple(removed), bytes_freed)


def _bytes_freed(paths: Iterable[Place]) -> int:
    """Of the files that have no name outside of ``paths``; objects have one name."""
    places = list(paths)
    files = [path / name for path in places if isinstance(path, Path) for name in store_of(path).sizes(path)]
    objects = [path for path in places if isinstance(path, ObjectPath)]
    return _bytes_unlinked(files) + sum(sum(store_of(path).sizes(path).values()) for path in objects)


def _bytes_unlinked(files: Iterable[Path]) -> int:
    found = [file.stat() for file in files]
    names = Counter((status.st_dev, status.st_ino) for status in found)
    by_file = {(status.st_dev, status.st_ino): status for status in found}
    return sum(by_file[key].st_size for key, count in names.items() if by_file[key].st_nlink <= count)
