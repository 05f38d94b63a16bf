"""How the members of a stripe protect a snapshot, and rebuild what some of them have lost."""

import socket
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from evermesh.fault.snapshot.coding import choose_engine
from evermesh.fault.snapshot.coding.engine import Engine
from evermesh.fault.snapshot.stripes.bandwidth import TokenBucket
from evermesh.fault.snapshot.stripes.copies import NO_PIECES, Pieces, digests_of_pieces, divide, gaps, shared_keys
from evermesh.fault.snapshot.stripes.errors import SnapshotsDiffer, TransferFailed
from evermesh.fault.snapshot.stripes.frames import Kind, Transfer, frame, read_frame
from evermesh.fault.snapshot.stripes.membership import Membership, close_all, connect
from evermesh.fault.snapshot.stripes.payload import Digests, Payload, digests_of
from evermesh.fault.snapshot.stripes.protecting import Protection
from evermesh.fault.snapshot.stripes.pump import Incoming, Outgoing, Pump
from evermesh.fault.snapshot.stripes.rebuilding import Held, Rebuilding
from evermesh.fault.snapshot.stripes.record import StripeRecord

_MOST_TOLD_BYTES = 1 << 26


class Rebuilt(NamedTuple):
    """What a rebuild did."""

    record: StripeRecord
    lost: frozenset[int]
    """Members that held nothing and hold all now."""
    repaired: Mapping[int, int]
    """Of other members the number of chunks and copies that were corrupt and are right now."""


class StripeTransfer:
    """One member's connections to all others of its stripe, kept from step to step. A context manager.

    Whatever fails closes the connections, so that the other members fail at once and not by their timeout; then a new
    transfer is opened. Not thread-safe.

    Args:
        listener: from :func:`listen`; it stays open, and is the caller's.
        absent: members that are lost and not replaced.
        bytes_per_s: bound on what is sent.
        timeout_s: a member that does nothing for so long is lost.
        given_up: set by another thread, it ends whatever is under way.

    Raises:
        WrongGeneration, MemberLost: as :func:`connect`.
    """

    def __init__(
        self,
        mine: Membership,
        listener: socket.socket,
        *,
        absent: Iterable[int] = (),
        bytes_per_s: float | None = None,
        timeout_s: float = 30.0,
        engine: Engine | None = None,
        given_up: threading.Event | None = None,
    ) -> None:
        self._mine, self._absent = mine, frozenset(absent)
        self._engine = engine or choose_engine().engine
        given_up = given_up or threading.Event()
        self._connections = connect(mine, listener, self._absent, timeout_s, given_up)
        self._pump = Pump(self._connections, TokenBucket(bytes_per_s), timeout_s, given_up)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        close_all(self._connections)
        self._connections.clear()

    def tell_all(self, step: int, told: bytes) -> tuple[bytes, ...]:
        """What every member tells the others, by rank; every member calls it, and nobody is absent.

        Raises:
            TransferFailed: a member failed, or told more than 64 MiB.
        """
        self._need_all()
        transfer, heard = Transfer(step, self._mine.generation), {self._mine.rank: told}

        def hear(peer: int) -> Incoming:
            heard[peer] = bytes((yield from read_frame(transfer, Kind.TELL, peer, 0, _MOST_TOLD_BYTES)))

        try:
            self._phase(lambda peer: frame(transfer, Kind.TELL, told), hear)
        except BaseException:
            self.close()
            raise
        return tuple(heard[member] for member in range(self._mine.code.parts))

    def find_copies(
        self, step: int, data: Sequence[memoryview], told: Sequence[Pieces], lengths: Sequence[int]
    ) -> tuple[Pieces, ...]:
        """What several members hold, by member, and who of them codes it; every member calls it and gets the same.

        Only what several keys are told of is read.

        Args:
            data: of this member.
            told: pieces of all members, by member, the same everywhere; their digests are not known yet.
            lengths: bytes of the data, by member.

        Raises:
            TransferFailed: a member failed, or told what cannot be.
        """
        keys = shared_keys(told)
        if not keys.size:
            return (NO_PIECES,) * self._mine.code.parts
        shared = [pieces[np.isin(pieces["key"], keys)] for pieces in told]
        own = digests_of_pieces(Payload(data), shared[self._mine.rank])
        for member, digests in enumerate(self.tell_all(step, own.tobytes())):
            if len(digests) != 8 * shared[member].size:
                raise SnapshotsDiffer(f"member {member} told {len(digests)} bytes of digests.", (member,))
            shared[member]["digest"] = np.frombuffer(digests, "<u8")
        return divide(shared, lengths, self._mine.code.parity)

    def protect(
        self,
        step: int,
        data: Sequence[memoryview],
        parity: memoryview,
        digests: Digests | None = None,
        pieces: tuple[Pieces, ...] | None = None,
    ) -> StripeRecord:
        """Keep parity of the others' data, and let them keep that of mine; every member calls it.

        Returns when all members have acknowledged: the snapshot survives the loss of as many of them as the code has
        parity parts. The data do not change meanwhile.

        Args:
            data: buffers that count as laid end to end; of any length on every member.
            parity: overwritten; ``parity_bytes`` of the longest data, as far as it is coded.
            digests: of what is coded of the data, by chunk; computed if not given.
            pieces: as ``find_copies`` has them: what a member does not code. Without, all is coded.

        Raises:
            TransferFailed: nothing is protected, and ``parity`` is useless; the kinds are in ``errors``.
        """
        self._need_all()
        pieces = pieces or (NO_PIECES,) * self._mine.code.parts
        payload = Payload(data).without(gaps(pieces[self._mine.rank]))
        digests = digests_of(payload) if digests is None else digests
        try:
            part = Protection(self._mine, step, payload, digests, parity, self._engine)
            self._phase(lambda peer: part.announce(), part.hear)
            part.begin()
            self._phase(part.give, part.take)
            self._phase(lambda peer: part.tell(), part.told)
        except BaseException:
            self.close()
            raise
        return part.record(pieces)

    def rebuild(
        self, step: int, record: StripeRecord | None, data: Sequence[memoryview], parity: memoryview
    ) -> Rebuilt:
        """Give every member of the stripe what it lacks of a protected snapshot; every member that is there calls it.

        On return the data, the parity and the record of every member are complete and compared with their digests.
        Where nobody lacks anything, this compares and no more.

        Args:
            record: None: this member holds nothing, and wants all.
            data: filled if there is no record, its corrupt chunks replaced if there is one. As large as it was, or
            larger.
            parity: likewise.

        Raises:
            TooManyErasures: fewer chunks of a row are left than the code needs, or of something that is not coded no copy.
            Every member raises it.
            TransferFailed: a member failed; repeat it. The kinds are in ``errors``.
        """
        self._need_connections()
        try:
            part = Rebuilding(
                self._mine, step, record, Held(Payload(data), Payload([parity])), self._engine, self._absent
            )
            self._phase(lambda peer: part.announce(), part.hear)
            part.agree()
            self._share_record(part)
            part.begin()
            self._phase(part.give, part.take)
            self._phase(part.fetching.give, part.fetching.take)
            self._phase(lambda peer: part.tell(), part.told)
        except BaseException:
            self.close()
            raise
        assert part.record is not None, "the plan was made with it"
        repaired = {member: len(rows) + len(part.corrupt_pieces[member]) for member, rows in part.corrupt.items()}
        return Rebuilt(part.record, part.lost, {member: number for member, number in repaired.items() if number})

    def _share_record(self, part: Rebuilding) -> None:
        giver = part.first_holder
        if self._mine.rank == giver:
            self._pump.run({}, {peer: part.give_record() for peer in part.lost})
        elif self._mine.rank in part.lost:
            self._pump.run({giver: part.take_record(giver)}, {})

    def _phase(self, outgoing: Callable[[int], Outgoing], incoming: Callable[[int], Incoming]) -> None:
        self._pump.run(
            {peer: incoming(peer) for peer in self._connections}, {peer: outgoing(peer) for peer in self._connections}
        )

    def _need_all(self) -> None:
        if self._absent:
            names = ", ".join(map(str, sorted(self._absent)))
            raise TransferFailed(
                f"members {names} are absent: a stripe is protected by all its members. Replace them, or make new stripes.",
                tuple(sorted(self._absent)),
            )
        self._need_connections()

    def _need_connections(self) -> None:
        if not self._connections:
            raise TransferFailed("this transfer has failed or was closed. Open another one.")
