"""The directory that holds the checkpoints of a job, and what is in it. In an object store: ``stores.attempts``.

    DIRECTORY/
    ├── latest                      text: the name of the newest committed step
    ├── step-00000010/              a committed checkpoint; never changed
    ├── .saving-step-00000020/      being written, or left by a killed save
    ├── .replaced-step-00000010/    set aside while a step is saved anew
    └── .removing-step-00000005/    being deleted

One job at a time saves in a directory; ``committing`` tells how.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from evermesh.checkpoint.committing import REPLACED, STEP, committed_steps, named_by_latest, step_of
from evermesh.checkpoint.errors import CheckpointCorrupt, CheckpointNotFound, StoreUnusable
from evermesh.checkpoint.format import MANIFEST, Manifest
from evermesh.checkpoint.stores.attempts import folder_of
from evermesh.checkpoint.stores.places import ObjectPath, Place, place_of
from evermesh.checkpoint.stores.store import store_of


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """One checkpoint of a directory, as its manifest tells."""

    path: Place
    step: int
    time_s: float
    """When it was saved, seconds since 1970."""
    world_size: int
    num_bytes: int
    """Bytes of its data files."""
    num_tensors: int
    is_latest: bool


def read_manifest(path: Place) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointNotFound: there is none.
        CheckpointCorrupt: it is not what was saved.
        StoreUnusable: it is in an object store that does not answer.
    """
    try:
        return _manifest(folder_of(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFound(path, f"it has no {MANIFEST}{instead_of(path)}") from error


def instead_of(path: Place) -> str:
    """For the error about a step that is not there: the newest complete checkpoint beside it, if there is one."""
    if not STEP.fullmatch(path.name):
        return ""
    others = (found for found in reversed(_step_paths(path.parent)) if found.name != path.name and _is_complete(found))
    newest = next(others, None)
    return f"; the newest complete one beside it is {newest}" if newest is not None else ""


@overload
def latest(directory: Path) -> Path | None: ...
@overload
def latest(directory: Place | str) -> Place | None: ...
def latest(directory: Place | str) -> Place | None:
    """The checkpoint to resume from, or None: the one that ``latest`` names; if that is missing or incomplete, the
    newest complete one. Checks the manifest and the sizes of files, not their checksums.

    Raises:
        StoreUnusable: it is in an object store that does not answer, so nobody knows what is there.
    """
    directory = place_of(directory)
    named = _named_by_latest(directory)
    if named is not None and _is_complete(named):
        return named
    return next((path for path in reversed(_step_paths(directory)) if _is_complete(path)), None)


def checkpoints(directory: Place | str) -> list[CheckpointInfo]:
    """The complete checkpoints of a directory, by step. Incomplete ones are left out, and those that are removed meanwhile.
    Raises as ``latest`` does."""
    newest, directory = latest(directory), place_of(directory)
    found = []
    for path in _step_paths(directory):
        with suppress(CheckpointNotFound):
            if _is_complete(path):
                found.append(_info(path, newest))
    return found


def _named_by_latest(directory: Place) -> Place | None:
    name = named_by_latest(directory)
    if name is None:
        return None
    path = directory / name
    return path if isinstance(path, ObjectPath) or path.exists() else directory / f"{REPLACED}{name}"


def _step_paths(directory: Place) -> list[Place]:
    """Step directories by step, and those set aside where the step itself is missing."""
    found: dict[int, Place] = {}
    if isinstance(directory, Path):
        aside = (path for path in directory.glob(f"{REPLACED}step-*"))
        found = {step_of(path): path for path in aside if STEP.fullmatch(path.name.removeprefix(REPLACED))}
    found |= committed_steps(directory)
    return [found[step] for step in sorted(found)]


def _is_complete(path: Place) -> bool:
    """Whether all files have their sizes, or parity makes up for those that do not, which it does in a file system."""
    try:
        folder = folder_of(path)
        manifest, sizes = _manifest(folder), store_of(folder).sizes(folder)
        lost = [name for name, num_bytes in manifest.sizes.items() if sizes.get(name) != num_bytes]
        return not lost or (isinstance(folder, Path) and manifest.can_do_without(lost))
    except StoreUnusable:  # nobody knows
        raise
    except (CheckpointCorrupt, OSError):
        return False


def _manifest(folder: Place) -> Manifest:
    file = folder / MANIFEST
    return Manifest.from_json(store_of(file).read(file), file)


def _info(path: Place, newest: Place | None) -> CheckpointInfo:
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
