"""Keepers that this node hosts in the place of lost ones, until what they keep is not needed any more."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel

from evermesh.fault.snapshot.keeper.layouts import Group, groups_in, layout_file, opened_layout, write_layout
from evermesh.launcher.agent.keeping import NodeKeeper
from evermesh.launcher.agent.loop import Loop
from evermesh.launcher.agent.striping import NodeStripe
from evermesh.launcher.messages import HostGuest, InMemory, Keep, KeeperTells

_START_S = 10.0
"""How long a keeper may take until others can read from it."""
_AGAIN_S = 0.01


class _Guest(NamedTuple):
    keeper: NodeKeeper
    stripe: NodeStripe


class Guests:
    """The guests of a node by name. ``own`` is its own keeper, which has the layouts of the snapshots that are rebuilt."""

    def __init__(
        self, loop: Loop, own: NodeKeeper, address: str, token: str, send: Callable[[BaseModel], None]
    ) -> None:
        self._loop, self._own, self._address, self._token, self._send = loop, own, address, token, send
        self._guests: dict[str, _Guest] = {}

    def host(self, order: HostGuest, run: Path) -> None:
        """Have a guest, and tell where other keepers reach it once ranks can read from it, too. Waits for nothing."""
        guest = self._guests.get(order.guest)
        if guest is None:
            keeper = NodeKeeper(run, order.guest, self._address, self._token, slots=1)  # nobody writes there
            guest = _Guest(
                keeper, NodeStripe(self._loop, keeper, self._address, self._token, self._sender(order.guest))
            )
            self._guests[order.guest] = guest
        guest.keeper.keep_for(order.launch)
        if not guest.keeper.is_there:
            self._refuse(order, "no keeper can be started for it")
        else:
            self._await(order, guest, time.monotonic() + _START_S)

    def stripe(self, name: str) -> NodeStripe | None:
        """The keeper of a guest as its stripe sees it; None: there is no such guest any more."""
        guest = self._guests.get(name)
        return guest.stripe if guest is not None else None

    def end(self, name: str) -> None:
        """End a guest with all that it keeps."""
        guest = self._guests.pop(name, None)
        if guest is not None:
            guest.keeper.leave(job_is_over=True)

    def look(self) -> list[tuple[str, str]]:
        """As :meth:`NodeKeeper.look`, of all guests."""
        return [told for guest in self._guests.values() for told in guest.keeper.look()]

    def in_memory(self) -> dict[str, InMemory]:
        """What they keep."""
        told = {name: guest.keeper.in_memory() for name, guest in self._guests.items()}
        return {name: found for name, found in told.items() if found is not None}

    @property
    def num_bytes(self) -> int:
        """Memory of their snapshots."""
        return sum(guest.keeper.num_bytes for guest in self._guests.values())

    def leave(self, *, job_is_over: bool) -> None:
        """Let them live on for a while without this agent, or end them."""
        for guest in self._guests.values():
            guest.keeper.leave(job_is_over=job_is_over)
        self._guests.clear()

    def _await(self, order: HostGuest, guest: _Guest, until_s: float) -> None:
        if self._guests.get(order.guest) is not guest:
            return  # ended meanwhile
        guest.keeper.look()
        if guest.keeper.address is None:
            if time.monotonic() < until_s:
                self._loop.after(_AGAIN_S, lambda: self._await(order, guest, until_s))
            else:
                self._refuse(order, f"its keeper does not serve within {_START_S:g} s")
            return
        try:
            self._describe(order, guest)
        except (OSError, ValueError) as error:
            self._refuse(order, f"it cannot be said what it keeps: {error}")
            return
        guest.stripe.keep(Keep(generation=order.generation, launch=order.launch))

    def _describe(self, order: HostGuest, guest: _Guest) -> None:
        """Write down what ranks of another layout must know, as this node knows it of its own part of the snapshot."""
        generation, _, digest = order.version
        for area in (guest.keeper.area, self._own.area):
            for group in groups_in(area):
                if (group.generation, group.shard_map) == (generation, digest):
                    content = layout_file(area, generation, digest, group.ranks[0]).read_bytes()
                    _, world_size, shard_map = opened_layout(content)
                    write_layout(guest.keeper.area, Group(generation, digest, order.ranks, world_size), shard_map)
                    return
        raise ValueError(f"the layout of step {order.version[1]} is not on this node")

    def _refuse(self, order: HostGuest, text: str) -> None:
        told = KeeperTells(generation=order.generation, about="listen", ok=False, text=text)
        self._sender(order.guest)(told)

    def _sender(self, name: str) -> Callable[[BaseModel], None]:
        """What a guest says, with its name."""
        return lambda message: self._send(message.model_copy(update={"guest": name}))
