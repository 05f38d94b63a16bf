"""Which nodes protect each other's snapshots, what that survives, and how they move the bytes."""

from evermesh.fault.snapshot.handshake import Address, listen
from evermesh.fault.snapshot.stripes.copies import (
    LEAST_PIECE_BYTES,
    MOST_PIECES,
    NO_PIECES,
    PIECE,
    Pieces,
    copied_bytes,
)
from evermesh.fault.snapshot.stripes.errors import (
    ChunkCorrupt,
    MemberLost,
    RecordUnreadable,
    SnapshotsDiffer,
    StripesImpossible,
    TransferFailed,
    TransferGivenUp,
    WrongGeneration,
)
from evermesh.fault.snapshot.stripes.membership import Membership
from evermesh.fault.snapshot.stripes.payload import Payload, digests_of
from evermesh.fault.snapshot.stripes.record import StripeRecord
from evermesh.fault.snapshot.stripes.rotation import CHUNK_BYTES, parity_bytes
from evermesh.fault.snapshot.stripes.transfer import Rebuilt, StripeTransfer

__all__ = [
    "CHUNK_BYTES",
    "LEAST_PIECE_BYTES",
    "MOST_PIECES",
    "NO_PIECES",
    "PIECE",
    "Address",
    "ChunkCorrupt",
    "MemberLost",
    "Membership",
    "Payload",
    "Pieces",
    "Rebuilt",
    "RecordUnreadable",
    "SnapshotsDiffer",
    "StripeRecord",
    "StripeTransfer",
    "StripesImpossible",
    "TransferFailed",
    "TransferGivenUp",
    "WrongGeneration",
    "copied_bytes",
    "digests_of",
    "listen",
    "parity_bytes",
]
