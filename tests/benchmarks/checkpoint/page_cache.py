"""Files that are on the disk and not in memory."""

import os
from pathlib import Path


def forget(path: Path) -> None:
    """Drop what the page cache holds of the files below ``path``, after it was written."""
    for file in path.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
