"""New directories that appear when all that is in them is on the disk, or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.files import sync_directory

_WRITING = ".converting-"


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A directory to write into, which becomes ``directory`` at the end of the block.

    After an error, or a crash at any byte, ``directory`` is as it was. What a killed conversion left is removed.

    Raises:
        ForeignUnusable: ``directory`` exists and is not empty.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ForeignUnusable(directory, "it is there already and not empty", "Name a new directory.")
    temporary = directory.with_name(_WRITING + directory.name)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _sync(temporary)
        os.rename(temporary, directory)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(directory.parent)


def _sync(directory: Path) -> None:
    """Return when all files and directories below ``directory`` are on the disk. Files were closed, so the disk has been
    writing them, and a directory of thousands costs one commit of the file system instead of one for each."""
    for folder, _, files in os.walk(directory):
        for name in files:
            descriptor = os.open(Path(folder, name), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(folder))
