"""The directory that holds the checkpoints of a job, and what is in it.

    DIRECTORY/
    ├── latest                      text: the name of the newest committed step
    ├── step-00000010/              a committed checkpoint; never changed
    ├── .saving-step-00000020/      being written, or left by a killed save
    ├── .replaced-step-00000010/    set aside while a step is saved anew
    └── .removing-step-00000005/    being deleted

One job at a time saves in a directory; ``committing`` tells how.
"""

from dataclasses import dataclass
from pathlib import Path

from evermesh.checkpoint.committing import LATEST, REPLACED, STEP, step_of
from evermesh.checkpoint.errors import CheckpointCorrupt, CheckpointNotFound
from evermesh.checkpoint.format import MANIFEST, Manifest


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


def _named_by_latest(directory: Path) -> Path | None:
    try:
        name = (directory / LATEST).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    if not STEP.fullmatch(name):
        return None
    path = directory / name
    return path if path.exists() else directory / f"{REPLACED}{name}"


def _step_paths(directory: Path) -> list[Path]:
    """Step directories by step, and those set aside where the step itself is missing."""
    found = {path.name: path for path in directory.glob(f"{REPLACED}step-*")}
    found = {name.removeprefix(REPLACED): path for name, path in found.items()}
    found |= {path.name: path for path in directory.glob("step-*")}
    return sorted((path for name, path in found.items() if STEP.fullmatch(name)), key=step_of)


def _is_complete(path: Path) -> bool:
    """Whether all files have their sizes, or parity makes up for those that do not."""
    try:
        manifest = read_manifest(path)
        return manifest.can_do_without([n for n, size in manifest.sizes.items() if _size(path / n) != size])
    except (CheckpointCorrupt, OSError):
        return False


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


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
