"""The keeper as a member of a stripe: keeps parity of what other nodes have sealed, and rebuilds with them what is lost.

Everything that moves bytes happens in a thread, one transfer at a time. Whatever fails leaves snapshots sealed, which is
all that ranks need to go on; that they are not protected is written down where the agent looks (``standing``).
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from evermesh.fault.snapshot.choosing import Version
from evermesh.fault.snapshot.keeper.parity import ParityBuffer, Protected, buffer_of, free_buffer
from evermesh.fault.snapshot.keeper.place import Place
from evermesh.fault.snapshot.keeper.portions import Portion, change_state, held_views, new_views, portions_of
from evermesh.fault.snapshot.keeper.sharing import Sealed, sealed_by
from evermesh.fault.snapshot.keeper.slots import State
from evermesh.fault.snapshot.keeper.standing import Standing
from evermesh.fault.snapshot.stripes import (
    RecordUnreadable,
    SnapshotsDiffer,
    StripeRecord,
    StripeTransfer,
    TransferFailed,
    TransferGivenUp,
    copied_bytes,
    listen,
    parity_bytes,
)

_SILENCE_S = 30.0
"""A member that is silent for so long is lost."""
_FAILURES = (OSError, LookupError, ValueError)
"""What may go wrong between members, memory and files; the errors of stripes are among these."""


class StripeMember:
    """The part of the keeper of ``area`` in a stripe. Listens on ``host`` only. Methods may be called by any thread.

    Args:
        make_room: gives a rank slots of so many bytes, as ``Area.make_room``.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, area: Path, host: str, make_room: Callable[[int, int], None]) -> None:
        self._area, self._make_room, self.host = area, make_room, host
        self._listener = listen(host)
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        """Of what follows."""
        self._place: Place | None = None
        self._epoch = 0
        """Of the last place, also when it was left."""
        self._sealed: dict[int, Version] = {}
        """The newest of every rank."""
        self._given_up = threading.Event()
        """Of the transfer that is open."""
        self._is_protecting = False
        self._busy = threading.Lock()
        """Held by whoever moves bytes; of what follows."""
        self._transfer: StripeTransfer | None = None

    @property
    def has_place(self) -> bool:
        """Whether snapshots are protected after they were sealed."""
        return self._place is not None

    def join(self, order: dict[str, Any]) -> None:
        """Take a place in a stripe. What was under way for an earlier one has ended when this returns.

        Raises:
            ValueError: a later place was given already.
        """
        place = Place.told(order)
        with self._lock:
            if place.mine.generation < self._epoch:
                raise ValueError(f"epoch {self._epoch} has begun, {place.mine.generation} is over")
            self._place, self._epoch = place, place.mine.generation
            self._sealed.clear()
            self._given_up.set()
        with self._busy:
            self._close()
            change_state(self._area, None, None, "sealed")

    def leave(self) -> None:
        """Give up the place in a stripe. What was under way for it has ended when this returns."""
        with self._lock:
            self._place = None
            self._sealed.clear()
            self._given_up.set()
        with self._busy:
            self._close()
            change_state(self._area, None, None, "sealed")

    def note_sealed(self, rank: int, version: Version) -> None:
        """A slot is ``protecting``; once all ranks of the node have sealed this snapshot, a thread protects it."""
        with self._lock:
            place = self._place
            if place is None or rank not in place.ranks:
                change_state(self._area, version, [rank], "sealed")
                return
            self._sealed[rank] = version
            if any(self._sealed.get(one) != version for one in place.ranks):
                return
            if self._is_protecting:  # an older one, which nobody waits for any more
                self._given_up.set()
        threading.Thread(target=self._protect, args=(place, version), name="protect", daemon=True).start()

    def rebuild(self, order: dict[str, Any]) -> dict[str, Any]:
        """Together with all other members, make whole what this node and they have of a snapshot.

        Raises:
            OSError, ValueError: it was not possible; the subclasses are those of stripes, and ``RoomMissing``.
        """
        version, began_s = Version(*order["version"]), time.monotonic()
        with self._lock:
            place = self._place
            if place is None or place.mine.generation != order["epoch"]:
                raise ValueError(f"epoch {order['epoch']} is not that of this place")
            self._given_up.set()
        with self._busy:
            self._close()
            protected = Protected.read(order["protected"])._replace(member=place.mine.rank)
            found = self._rebuild(place, version, protected)
            self._close()
        self._achieved(place, protected).write(self._area)
        return found | {"seconds": time.monotonic() - began_s}

    def _protect(self, place: Place, version: Version) -> None:
        began_s = time.monotonic()
        with self._busy:
            if not self._begin(place, version):
                change_state(self._area, version, place.ranks, "sealed")
                return
            state, standing = self._protected(place, version)
            with self._lock:
                self._is_protecting = False  # before ranks see the state: what they seal then is no newer one meanwhile
                is_current = place is self._place
            change_state(self._area, version, place.ranks, state)
        if is_current:
            standing._replace(seconds=time.monotonic() - began_s).write(self._area)

    def _begin(self, place: Place, version: Version) -> bool:
        with self._lock:
            wanted = place is self._place and all(self._sealed.get(rank) == version for rank in place.ranks)
            self._is_protecting = wanted
            if wanted and self._given_up.is_set():
                self._close()
            return wanted

    def _protected(self, place: Place, version: Version) -> tuple[State, Standing]:
        epoch = place.mine.generation
        try:
            protected = self._move(place, version)
        except _FAILURES as error:
            self._close()
            return "sealed", Standing(epoch, version.step, False, f"{type(error).__name__}: {error}")
        return "protected", self._achieved(place, protected)

    def _move(self, place: Place, version: Version) -> Protected:
        mine, own = place.mine, sealed_by(self._area, version, portions_of(self._area, version, place.ranks))
        told = [Sealed.from_bytes(text) for text in self._told(place, version.step, own.to_bytes())]
        others = {one.version for one in told}
        if others != {version}:
            raise SnapshotsDiffer(f"members have sealed different snapshots: {sorted(others)}")
        held = [one.num_bytes for one in told]
        with held_views(self._area, version, place.ranks) as views:
            pieces = self._opened(place).find_copies(version.step, views, [one.pieces for one in told], held)
            coded = tuple(num_bytes - copied_bytes(found) for num_bytes, found in zip(held, pieces, strict=True))
            portions = tuple(one.portions for one in told)
            protected = Protected(version, mine.stripe, mine.rank, str(mine.code), portions, coded)
            buffer = free_buffer(self._area)
            buffer.make_room(parity_bytes(mine.code, protected.longest))
            with buffer.opened() as parity:
                record = self._opened(place).protect(version.step, views, parity, pieces=pieces)
        buffer.hold(protected, record.to_bytes())
        return protected

    @staticmethod
    def _achieved(place: Place, protected: Protected) -> Standing:
        mine = place.mine
        return Standing(
            mine.generation,
            protected.version.step,
            True,
            "",
            protected.data_bytes,
            protected.coded_bytes[mine.rank],
            parity_bytes(mine.code, protected.longest),
        )

    def _told(self, place: Place, step: int, own: bytes) -> Sequence[bytes]:
        """What all members tell. A connection that has broken since it was used last is opened anew, once."""
        is_used = self._transfer is not None
        try:
            return self._opened(place).tell_all(step, own)
        except TransferGivenUp:
            raise
        except TransferFailed:
            self._close()
            if not is_used:
                raise
            return self._opened(place).tell_all(step, own)

    def _rebuild(self, place: Place, version: Version, protected: Protected) -> dict[str, Any]:
        mine = place.mine
        buffer, record = self._held(version, protected)
        if buffer is None:
            buffer = free_buffer(self._area)
            buffer.make_room(parity_bytes(mine.code, protected.longest))
        with buffer.opened() as parity:
            if record is not None:
                with held_views(self._area, version, place.ranks) as views:
                    done = self._opened(place).rebuild(version.step, record, views, parity)
            else:
                portions = protected.portions[mine.rank]
                self._make_slots(portions)
                with new_views(self._area, version, portions) as views:
                    done = self._opened(place).rebuild(version.step, None, views, parity)
        if record is None:
            buffer.hold(protected, done.record.to_bytes())
        return {"lost": sorted(done.lost), "repaired": dict(done.repaired)}

    def _held(self, version: Version, protected: Protected) -> tuple[ParityBuffer | None, StripeRecord | None]:
        """What this node has of it; all or nothing."""
        buffer = buffer_of(self._area, version)
        if buffer is None:
            return None, None
        try:
            if buffer.protected() == protected:
                return buffer, StripeRecord.from_bytes(buffer.record())
        except (OSError, RecordUnreadable):
            pass  # as if it had nothing
        buffer.forget()
        return None, None

    def _make_slots(self, portions: Sequence[Portion]) -> None:
        for portion in portions:
            self._make_room(portion.rank, portion.data_bytes)

    def _opened(self, place: Place) -> StripeTransfer:
        if self._transfer is None:
            with self._lock:
                if place is not self._place:
                    raise TransferGivenUp("another place has been taken")
                given_up = self._given_up = threading.Event()
            self._transfer = StripeTransfer(
                place.mine, self._listener, bytes_per_s=place.bytes_per_s, timeout_s=_SILENCE_S, given_up=given_up
            )
        return self._transfer

    def _close(self) -> None:
        if self._transfer is not None:
            with suppress(OSError):
                self._transfer.close()
            self._transfer = None
