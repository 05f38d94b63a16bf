"""Removing checkpoints by a policy, at any time and from outside the job."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from evermesh.checkpoint import committing
from evermesh.checkpoint.directory import latest
from evermesh.checkpoint.errors import CheckpointNotFound
from evermesh.checkpoint.retention import Retention


@dataclass(frozen=True, slots=True)
class Pruning:
    """What a policy keeps and removes of a directory."""

    directory: Path
    kept: tuple[int, ...]
    """Steps, ascending; that of ``latest`` is always one."""
    removed: tuple[int, ...]
    bytes_freed: int
    """On the disk. A file that a kept checkpoint also names, by a hard link, frees nothing."""


def prune(directory: Path | str, retention: Retention, *, dry_run: bool = True) -> Pruning:
    """Remove the checkpoints that ``retention`` does not keep; with ``dry_run`` only tell which.

    The checkpoint to resume from always stays. Killed at any moment, every checkpoint is whole or gone. A job that saves
    in the directory meanwhile is not disturbed.

    Raises:
        CheckpointNotFound: there is no complete checkpoint, so nothing that a removal could leave.
    """
    directory = Path(directory)
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


def _bytes_freed(paths: Iterable[Path]) -> int:
    """Of the files that have no name outside of ``paths``."""
    found = [entry.stat() for path in paths for entry in path.iterdir() if entry.is_file()]
    names = Counter((status.st_dev, status.st_ino) for status in found)
    by_file = {(status.st_dev, status.st_ino): status for status in found}
    return sum(by_file[key].st_size for key, count in names.items() if by_file[key].st_nlink <= count)
