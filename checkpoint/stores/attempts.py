"""How a checkpoint becomes visible in an object store, and how it goes, where nothing can be renamed. All of it on one rank.

    DIRECTORY/
    ├── latest                          text: the name of the newest committed step
    └── step-00000010/
        ├── committed                   text: the name of the attempt that is the checkpoint
        └── attempt-IDENTITY/           its files, the manifest the last of them; never changed

Every attempt to save writes below a name of its own. One small object, ``committed``, makes it the checkpoint; stores
replace an object as a whole, so a reader sees the attempt before or this one, whole in both cases. Without that object
there is no checkpoint, whatever else is there.
"""

import re

from evermesh.checkpoint.encoding import MANIFEST
from evermesh.checkpoint.stores.places import ObjectPath, Place
from evermesh.checkpoint.stores.store import objects_of, store_of

STEP = re.compile(r"step-(\d{8,})")
COMMITTED = "committed"
ATTEMPT = "attempt-"
_KEY = re.compile(rf"(.*/)?{STEP.pattern}/{ATTEMPT}[^/]+/[^/]+")


def folder_of(path: Place) -> Place:
    """Where the files of a checkpoint are: in the folder of its attempt if it names one, else in its own."""
    try:
        name = store_of(path).read(path / COMMITTED).decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return path
    return path / name if name.startswith(ATTEMPT) and "/" not in name else path


def is_checkpoint(path: ObjectPath) -> bool:
    """Whether there is one at ``path``: of an attempt, or copied there without it."""
    return not {COMMITTED, MANIFEST}.isdisjoint(objects_of(path).names(path))


def reclaim(directory: ObjectPath, identity: str) -> None:
    """Delete what killed saves have left, all but what belongs to the attempt ``identity``: objects of attempts that never
    became a checkpoint or were replaced, and the parts of uploads that were not finished."""
    store = objects_of(directory)
    for step in filter(STEP.fullmatch, store.folders(directory)):
        path = directory / step
        attempts = [name for name in store.folders(path) if name.startswith(ATTEMPT)]
        committed = folder_of(path).name if attempts else ""
        for name in attempts:
            if name not in (committed, f"{ATTEMPT}{identity}"):
                store.discard(path / name)
    _abort_uploads(directory, identity)


def is_committed(path: ObjectPath, identity: str) -> bool:
    """Whether an attempt is the checkpoint of the step at ``path``."""
    return folder_of(path).name == f"{ATTEMPT}{identity}"


def publish(path: ObjectPath, identity: str) -> None:
    """Make an attempt, all of whose objects are there, the checkpoint of the step at ``path``."""
    objects_of(path).put(path / COMMITTED, f"{ATTEMPT}{identity}\n".encode())


def clear(path: ObjectPath, identity: str) -> None:
    """After a commit: delete the attempts that were the checkpoint of this step before."""
    store = objects_of(path)
    for name in store.folders(path):
        if name.startswith(ATTEMPT) and name != f"{ATTEMPT}{identity}":
            store.discard(path / name)


def roll_back(path: ObjectPath, identity: str) -> None:
    """After a save that failed: delete its objects. A checkpoint of the same step was never touched."""
    if is_committed(path, identity):
        return
    store, files = objects_of(path), path / f"{ATTEMPT}{identity}"
    store.discard(files)
    store.abort_uploads(files, lambda _: True)


def remove(path: ObjectPath) -> None:
    """Delete a checkpoint. Killed at any moment it is whole or gone, and the next save deletes what is left."""
    store = objects_of(path)
    store.delete([path / COMMITTED])
    store.discard(path)


def _abort_uploads(directory: ObjectPath, identity: str) -> None:
    """Those of other attempts to save; whatever else is uploaded below the same prefix is none of ours."""
    own = f"/{ATTEMPT}{identity}/"
    objects_of(directory).abort_uploads(directory, lambda key: _KEY.fullmatch(key) is not None and own not in key)
