"""One member's part in getting back what nobody codes, and what others code: copies, from members that have them."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import NamedTuple

from evermesh.fault.snapshot.coding import TooManyErasures
from evermesh.fault.snapshot.stripes.copies import Identity, identities, parts_of
from evermesh.fault.snapshot.stripes.errors import ChunkCorrupt, SnapshotsDiffer, TransferFailed
from evermesh.fault.snapshot.stripes.frames import Kind, Transfer, chunk, read_header, read_into
from evermesh.fault.snapshot.stripes.payload import Payload
from evermesh.fault.snapshot.stripes.pump import Incoming, Outgoing
from evermesh.fault.snapshot.stripes.record import StripeRecord
from evermesh.fault.snapshot.stripes.schedule import Damage


class Fetch(NamedTuple):
    """A piece that one member gets from another; pieces by their numbers in the record."""

    member: int
    piece: int
    giver: int
    given: int


def corrupt_pieces(record: StripeRecord, member: int, data: Payload) -> frozenset[int]:
    """The pieces that a member does not code and whose bytes are not what the record says."""
    pieces = record.pieces[member]
    found = zip(parts_of(data, pieces), pieces["is_coded"].tolist(), pieces["digest"].tolist(), strict=True)
    return frozenset(
        at for at, (part, is_coded, digest) in enumerate(found) if not is_coded and part.digest() != digest
    )


def fetches(record: StripeRecord, damage: Damage, corrupt: Mapping[int, AbstractSet[int]]) -> list[Fetch]:
    """Who gets which piece from whom, once everybody who is there has all that he codes: a pure function of what all members
    have told each other.

    Args:
        corrupt: of members that are not lost the pieces that are not what the record says.

    Raises:
        TooManyErasures: of a piece that nobody codes no copy is left.
        TransferFailed: who codes a piece is absent.
    """
    wanted = {member: _uncoded(record, member) for member in sorted(damage.lost)}
    wanted |= {member: sorted(corrupt[member]) for member in sorted(corrupt) if member not in damage.lost}
    if not any(wanted.values()):
        return []
    known = [identities(pieces) for pieces in record.pieces]
    holders = _holders(record, known)
    given = dict.fromkeys(range(record.code.parts), 0)
    found = []
    for member, pieces in wanted.items():
        for at in pieces:
            copies = [held for held in holders[known[member][at]] if held.member != member]
            able = [held for held in copies if held.can_give(damage, corrupt)]
            if not able:
                raise _gone(record, member, at, copies)
            giver = min(able, key=lambda held: (given[held.member], held.member))
            given[giver.member] += int(record.pieces[member][at]["num_bytes"])
            found.append(Fetch(member, at, giver.member, giver.piece))
    return found


class Fetching:
    """A phase of generators for every other member, behind those in which all that is coded was rebuilt.

    Copies of something may be with one member alone, so that it sends for long while others have nothing to do. Who receives
    tells all of every copy: nobody takes the others for lost meanwhile.
    """

    def __init__(
        self, member: int, transfer: Transfer, record: StripeRecord, data: Payload, plan: Sequence[Fetch]
    ) -> None:
        self._member, self._transfer, self._record, self._data, self._plan = member, transfer, record, data, plan
        self._wanted = {peer: sum(fetch.member == peer for fetch in plan) for peer in range(record.code.parts)}
        self._received = 0

    def give(self, peer: int) -> Outgoing:
        """Send the pieces that ``peer`` gets from here, and tell of those that came here."""
        for fetch in self._plan:
            if (fetch.giver, fetch.member) == (self._member, peer):
                yield from chunk(self._transfer, fetch.piece, self._part(fetch.given))
        for number in range(self._wanted[self._member]):
            while self._received <= number:
                yield None
            yield self._transfer.header(Kind.COPIED, 0)

    def take(self, peer: int) -> Incoming:
        """Receive the pieces that ``peer`` sends, and hear of those that came there."""
        for fetch in self._plan:
            if (fetch.member, fetch.giver) == (self._member, peer):
                yield from self._take(fetch)
                self._received += 1
        for _ in range(self._wanted[peer]):
            yield from read_header(self._transfer, Kind.COPIED, peer)

    def _take(self, fetch: Fetch) -> Incoming:
        part = self._part(fetch.piece)
        header = yield from read_header(self._transfer, Kind.CHUNK, fetch.giver)
        if (header.row, header.length) != (fetch.piece, part.nbytes):
            raise SnapshotsDiffer(
                f"member {fetch.giver} sent {header.length:,} bytes of piece {header.row}; expected were {part.nbytes:,} of "
                f"{fetch.piece}.",
                (fetch.giver,),
            )
        digest = yield from read_into(part)
        if digest != int(self._record.pieces[self._member][fetch.piece]["digest"]):
            raise ChunkCorrupt(
                f"the copy of piece {fetch.piece} of member {self._member} that member {fetch.giver} sent has another digest "
                "than the record says: it changed since it was compared, or on the way. Rebuild again.",
                (fetch.giver,),
            )

    def _part(self, at: int) -> Payload:
        return next(parts_of(self._data, self._record.pieces[self._member][at : at + 1]))


class _Copy(NamedTuple):
    """Where a piece is."""

    member: int
    piece: int
    is_coded: bool

    def can_give(self, damage: Damage, corrupt: Mapping[int, AbstractSet[int]]) -> bool:
        """Whether it will be there and right when it is wanted: what is coded was rebuilt by then."""
        if self.is_coded:
            return self.member not in damage.absent
        is_there = self.member not in damage.lost and self.member not in damage.absent
        return is_there and self.piece not in corrupt.get(self.member, ())


def _uncoded(record: StripeRecord, member: int) -> list[int]:
    return [at for at, is_coded in enumerate(record.pieces[member]["is_coded"].tolist()) if not is_coded]


def _holders(record: StripeRecord, known: Sequence[Sequence[Identity]]) -> dict[Identity, list[_Copy]]:
    found: dict[Identity, list[_Copy]] = {}
    for member, (pieces, of_member) in enumerate(zip(record.pieces, known, strict=True)):
        for at, (piece, is_coded) in enumerate(zip(of_member, pieces["is_coded"].tolist(), strict=True)):
            found.setdefault(piece, []).append(_Copy(member, at, bool(is_coded)))
    return found


def _gone(record: StripeRecord, member: int, at: int, copies: Sequence[_Copy]) -> Exception:
    coding = [held.member for held in copies if held.is_coded]
    if coding:
        text = f"member {coding[0]} is absent, and codes piece {at} of member {member} too. Replace it."
        return TransferFailed(text, tuple(coding))
    names = ", ".join(map(str, sorted({member, *(held.member for held in copies)})))
    what = f"copies of piece {at} of step {record.step}, which only members {names} have"
    return TooManyErasures(what, len(copies) + 1, record.code.parity)
