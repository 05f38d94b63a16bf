"""The errors of this room.

EvermeshError
└── EventLogUnusable    (OSError)    the event log cannot be opened or written
"""

from pathlib import Path

from evermesh.parallelism.errors import EvermeshError


class EventLogUnusable(EvermeshError, OSError):
    """The event log cannot be opened or written."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"the event log {path} cannot be written: {error}. Free space there, or choose another path.")
        self.path, self.errno = path, error.errno
