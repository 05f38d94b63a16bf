"""The errors of stripes.

EvermeshError
├── StripesImpossible   (ValueError)          nodes, failure domains and code do not go together
├── RecordUnreadable    (ValueError)          the record of a protected snapshot is cut off or damaged
└── TransferFailed      (ConnectionError)     members did not protect or rebuild a snapshot together
    ├── MemberLost                            a member closed its connection, or was silent too long
    ├── WrongGeneration                       a member belongs to another attempt
    ├── SnapshotsDiffer                       members hold different snapshots, or began different transfers
    ├── ChunkCorrupt                          a chunk has another digest than the record says
    └── TransferGivenUp                       nobody wants it any more
"""

from evermesh.parallelism.errors import EvermeshError


class StripesImpossible(EvermeshError, ValueError):
    """Nodes, failure domains and code do not go together."""


class RecordUnreadable(EvermeshError, ValueError):
    """The record of a protected snapshot is cut off or damaged."""


class TransferFailed(EvermeshError, ConnectionError):
    """A snapshot was not protected, or not rebuilt; what was protected before is as it was. ``members`` are at
    fault."""

    def __init__(self, message: str, members: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.members = members


class MemberLost(TransferFailed):
    """A member closed its connection, never connected, or was silent for too long."""


class WrongGeneration(TransferFailed):
    """A member belongs to another generation."""


class SnapshotsDiffer(TransferFailed):
    """Members hold different snapshots of one step, or began different transfers."""


class ChunkCorrupt(TransferFailed):
    """A chunk has another digest than was announced."""


class TransferGivenUp(TransferFailed):
    """Another thread of this member has given it up."""
