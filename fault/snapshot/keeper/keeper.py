"""The keeper of a node: gives memory to ranks, makes snapshots of what they copy there, and outlives them.

It answers orders, each a JSON object with ``order``; every answer has ``ok``, and ``fact`` where that is false:

    hello                                                   which keeper this is
    reserve   generation, rank, shard_map, data_bytes, ...  make room for two snapshots of a rank
    seal      generation, rank, slot, step                  what the rank has copied there is complete
    inventory                                               the snapshots there are
    scrub                                                   look now whether they are still what was sealed
    listen    host                                          which port other keepers reach this one at
    join      epoch, stripe, member, ...                    take a place in a stripe; what is sealed is protected from now on
    leave                                                   have no place: what is sealed is not protected from now on
    rebuild   epoch, version, protected                     make a snapshot whole, together with all other members
    release   rank                                          give its memory back
    serve     host, secret                                  let other nodes read, over TCP on this address
    end                                                     give everything back, and end

Nothing that belongs to an older generation than the newest that a rank told is done.
"""

import json
import os
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from evermesh.checkpoint.background.memory import RoomMissing
from evermesh.fault.snapshot.keeper.area import SOCKET, Area
from evermesh.fault.snapshot.keeper.layouts import forget_layouts
from evermesh.fault.snapshot.keeper.scrubbing import Scrubber
from evermesh.fault.snapshot.keeper.sealing import NotSealed, Reservation, seal
from evermesh.fault.snapshot.keeper.serving import ReadService
from evermesh.fault.snapshot.keeper.slots import NUM_SLOTS, State, held_by, ranks_in
from evermesh.fault.snapshot.keeper.wire import is_own, line_of

if TYPE_CHECKING:
    from evermesh.fault.snapshot.keeper.striping import StripeMember

_LOOK_S = 0.2
Order = dict[str, Any]


class Keeper:
    """Serves the area until told to end, or until nobody has been connected for ``idle_s``."""

    def __init__(self, area: Area, key: str, nonce: str, idle_s: float) -> None:
        self._area, self._key, self._nonce, self._idle_s = area, key, nonce, idle_s
        self._lock = threading.Lock()
        """Of all that follows."""
        self._generation = 0
        self._reservations: dict[int, Reservation] = {}
        self._slots: dict[int, threading.Lock] = {}
        """By rank: held while its memory is made, sealed or given back."""
        self._connected, self._last_s = 0, time.monotonic()
        self._has_ended = threading.Event()
        self._repairing = threading.Lock()
        """Held while slots are made whole, and while one is looked at again and marked."""
        self._scrubber = Scrubber(area.path, self._repairing)
        self._stripe: StripeMember | None = None
        self._service: ReadService | None = None

    def run(self) -> None:
        """Return when it has ended; its memory is gone then."""
        path = self._area.path / SOCKET
        path.unlink(missing_ok=True)
        server = _Server(str(path), self)
        threading.Thread(target=server.serve_forever, args=(_LOOK_S,), daemon=True).start()
        self._scrubber.start()
        while not self._has_ended.wait(_LOOK_S) and not self._is_forgotten():
            pass
        if self._service is not None:
            self._service.close()
        self._area.close()

    def answer(self, order: Order) -> Order:
        """Carry out an order; it is done when this returns."""
        try:
            work: Callable[[Order], Order] = getattr(self, f"_{order['order'].replace(' ', '_')}_order")
            return {"ok": True} | work(order)
        except RoomMissing as error:
            return {"ok": False, "fact": str(error), "needed": error.bytes_needed, "free": error.bytes_free}
        except (NotSealed, OSError, LookupError, AttributeError, TypeError, ValueError) as error:
            return {"ok": False, "fact": f"{type(error).__name__}: {error}"}

    def note_connection(self, change: int) -> None:
        """Somebody came (1) or left (-1)."""
        with self._lock:
            self._connected += change
            self._last_s = time.monotonic()

    def _is_forgotten(self) -> bool:
        with self._lock:
            return not self._connected and time.monotonic() - self._last_s > self._idle_s

    def _hello_order(self, _: Order) -> Order:
        return {"pid": os.getpid(), "nonce": self._nonce, "key": self._key}

    def _reserve_order(self, order: Order) -> Order:
        told = Reservation(**{name: order[name] for name in Reservation._fields})
        with self._lock:
            if told.generation < self._generation:
                raise NotSealed(f"generation {self._generation} has begun, {told.generation} is over")
            self._generation = told.generation
            self._reservations[told.rank] = told  # what an older attempt still has sealed is given up
        with self._slots_of(told.rank):
            self._area.make_room(told.rank, told.data_bytes)
        held = [held.record for rank in ranks_in(self._area.path) for held in held_by(self._area.path, rank)]
        wanted = {(record.generation, record.shard_map) for record in held}
        forget_layouts(self._area.path, wanted | {(told.generation, told.shard_map)})
        return {}

    def _seal_order(self, order: Order) -> Order:
        rank, generation, began_s = order["rank"], order["generation"], time.monotonic()
        with self._lock:
            told = self._reservations[rank]

        def is_wanted() -> bool:
            with self._lock:
                return self._reservations.get(rank) is told and generation == self._generation

        with self._slots_of(rank):
            if not is_wanted():
                raise NotSealed(f"generation {generation} is over")
            stripe = self._stripe if self._stripe is not None and self._stripe.has_place else None
            then: State = "sealed" if stripe is None else "protecting"
            record = seal(self._area.path, told, order["slot"], order["step"], is_wanted, then)
        if stripe is not None:
            stripe.note_sealed(rank, record.version)
        return {"step": order["step"], "seconds": time.monotonic() - began_s}

    def _inventory_order(self, _: Order) -> Order:
        return {"snapshots": inventory(self._area.path), "rotten": self._scrubber.rotten}

    def _scrub_order(self, _: Order) -> Order:
        self._scrubber.look(pace=None)
        return {"rotten": self._scrubber.rotten}

    def _listen_order(self, order: Order) -> Order:
        from evermesh.fault.snapshot.keeper.striping import StripeMember  # takes numpy, which one node does not need

        with self._lock:
            if self._stripe is None or self._stripe.host != order["host"]:
                self._stripe = StripeMember(self._area.path, order["host"], self._area.make_room)
            return {"port": self._stripe.port}

    def _join_order(self, order: Order) -> Order:
        self._member.join(order)
        return {}

    def _leave_order(self, _: Order) -> Order:
        if self._stripe is not None:
            self._stripe.leave()
        return {}

    def _rebuild_order(self, order: Order) -> Order:
        with self._repairing:
            return self._member.rebuild(order)

    @property
    def _member(self) -> "StripeMember":
        if self._stripe is None:
            raise LookupError("it was not told where to listen")
        return self._stripe

    def _release_order(self, order: Order) -> Order:
        with self._lock:
            self._reservations.pop(order["rank"], None)
        with self._slots_of(order["rank"]):
            self._area.release(order["rank"])
        return {}

    def _serve_order(self, order: Order) -> Order:
        host, secret = str(order["host"]), bytes.fromhex(order["secret"])
        with self._lock:
            before = self._service
        if before is None or (before.host, before.secret) != (host, secret):
            if before is not None:
                before.close()
            service = ReadService(self._area.path, self._key, host, secret, self.note_connection)
            with self._lock:
                self._service = service
        assert self._service is not None
        return {"port": self._service.address.port}

    def _end_order(self, _: Order) -> Order:
        self._has_ended.set()
        return {}

    def _slots_of(self, rank: int) -> threading.Lock:
        with self._lock:
            return self._slots.setdefault(rank, threading.Lock())


def inventory(area: Any) -> list[dict[str, Any]]:
    """The snapshots in an area, also of a keeper that has ended."""
    return [
        {"rank": rank, "slot": held.number, "state": held.state, **held.record._asdict()}
        for rank in ranks_in(area)
        for held in held_by(area, rank)
    ]


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, path: str, keeper: Keeper) -> None:
        self.keeper = keeper
        super().__init__(path, _Connection)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        assert isinstance(request, socket.socket)
        return is_own(request)


class _Connection(socketserver.StreamRequestHandler):
    server: _Server

    def handle(self) -> None:
        self.server.keeper.note_connection(1)
        try:
            for line in self.rfile:
                self.wfile.write(line_of(self.server.keeper.answer(json.loads(line))))
        except (OSError, ValueError):  # it is gone, or says what no one of us says
            return
        finally:
            self.server.keeper.note_connection(-1)


__all__ = ["NUM_SLOTS", "Keeper", "inventory"]
