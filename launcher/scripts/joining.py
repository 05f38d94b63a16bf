"""How the launchers of a job on several machines find each other.

Node 0 listens on the master's port until all nodes have come, and then no more: the connections stay, and the port is
free for the store of rank 0. One port is all that must be open between the machines.
"""

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from evermesh.launcher.scripts.errors import NodesMissing, ScriptRefused
from evermesh.launcher.scripts.guest import Guest
from evermesh.launcher.scripts.host import Host
from evermesh.launcher.scripts.nodes import number_ranks
from evermesh.launcher.scripts.options import ScriptJob
from evermesh.launcher.scripts.wakeups import Wakeups
from evermesh.launcher.scripts.where import Machines
from evermesh.launcher.scripts.wire import Connection

_VERSION = 1
_RETRY_S = 0.2
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Joined:
    """All nodes have come."""

    peers: Host | Guest
    run_id: str
    """That of node 0, for all."""


def join(job: ScriptJob, where: Machines) -> Joined:
    """Wait until all nodes of the job are there.

    Raises:
        NodesMissing: they are not, in the time that ``where`` gives them.
        ScriptRefused: node 0 does not want this one, or the port is taken.
    """
    deadline_s = time.monotonic() + where.join_timeout_s
    if where.node_rank == 0 or (where.node_rank is None and _is_mine(where.master_addr)):
        try:
            listener = _listen(where.master_port)
        except OSError as error:
            if where.node_rank == 0:
                why = os.strerror(error.errno or 0)
                raise ScriptRefused(
                    f"port {where.master_port} cannot be opened here ({why}). Give another --master-port on all machines."
                ) from error
        else:  # whoever opens it first is node 0
            return _Gathering(job, where, listener).run(deadline_s)
    return _visit(job, where, deadline_s)


class _Gathering:
    """Node 0 while the others come."""

    def __init__(self, job: ScriptJob, where: Machines, listener: socket.socket) -> None:
        self._job, self._where, self._listener = job, where, listener
        self._wakeups = Wakeups()
        self._waiting: dict[Connection, dict[str, Any]] = {}
        """Those that asked to join, with what they said."""

    def run(self, deadline_s: float) -> Joined:
        with self._wakeups, self._listener:
            self._wakeups.add(self._listener, self._accept)
            while len(self._waiting) < self._where.nodes - 1:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    raise NodesMissing(_missing(self._where, 1 + len(self._waiting)))
                self._wakeups.take(left_s)
        return self._seat()

    def _accept(self) -> None:
        with suppress(OSError):  # it has changed its mind
            guest = Connection(self._listener.accept()[0])
            self._wakeups.add(guest, partial(self._read, guest))

    def _read(self, guest: Connection) -> None:
        for message in guest.receive():
            refusal = self._refusal(message)
            if refusal:
                guest.send("refused", text=refusal)
                guest.is_lost = True
            elif not guest.is_lost:
                self._waiting[guest] = message
        if guest.is_lost:
            self._waiting.pop(guest, None)
            self._wakeups.remove(guest)
            guest.close()

    def _refusal(self, message: dict[str, Any]) -> str | None:
        """Why the sender cannot join; None: it can."""
        rank, nodes = message.get("node_rank"), self._where.nodes
        taken = [said["node_rank"] for said in self._waiting.values()]
        if message["kind"] != "join" or message.get("version") != _VERSION:
            return "node 0 runs another version of Evermesh"
        if message.get("key") != self._where.key:
            return f"another job is at this address: its --rdzv-id is {self._where.key}, not {message.get('key')}"
        if message.get("nodes") != nodes:
            return f"node 0 was started with --nnodes {nodes}, this one with {message.get('nodes')}"
        if rank is not None and (rank == 0 or rank in taken):
            return f"there is another node {rank}. Every machine needs a --node-rank of its own"
        return None

    def _seat(self) -> Joined:
        """Number the nodes: those that have no number yet take what is left, in the order in which they came."""
        numbers = [said["node_rank"] for said in self._waiting.values()]
        free = iter(sorted({*range(1, self._where.nodes)} - {*numbers}))
        guests = {
            next(free) if number is None else number: guest
            for number, guest in zip(numbers, self._waiting, strict=True)
        }
        workers = [self._job.workers] + [int(self._waiting[guests[number]]["workers"]) for number in sorted(guests)]
        for number, guest in guests.items():
            guest.send("joined", node=number, workers=workers, run_id=self._job.run_id)
        node = number_ranks(workers)[0]
        return Joined(Host(node, guests, self._job.max_restarts, self._job.grace_s), self._job.run_id)


def _visit(job: ScriptJob, where: Machines, deadline_s: float) -> Joined:
    """Ask node 0 again and again, until it is there and all others are."""
    request = {
        "version": _VERSION,
        "nodes": where.nodes,
        "node_rank": where.node_rank,
        "workers": job.workers,
        "key": where.key,
    }
    while time.monotonic() < deadline_s:
        with suppress(OSError):  # it is not there yet, or its name is not known yet
            stream = socket.create_connection((where.master_addr, where.master_port), _CONNECT_TIMEOUT_S)
            host = Connection(stream)
            host.send("join", **request)
            answer = host.wait_for_one(max(_RETRY_S, deadline_s - time.monotonic()))
            if answer is not None and answer["kind"] == "joined":
                node = number_ranks(answer["workers"])[answer["node"]]
                return Joined(Guest(node, host), answer["run_id"])
            host.close()
            if answer is not None and answer["kind"] == "refused":
                raise ScriptRefused(f"node 0 at {where.master_addr}:{where.master_port} refuses: {answer['text']}.")
        time.sleep(_RETRY_S)
    raise NodesMissing(_missing(where, None))


def _missing(where: Machines, come: int | None) -> str:
    address = f"{where.master_addr}:{where.master_port}"
    seen = f"{come} of {where.nodes} nodes came to" if come else "node 0 was not, or not with all nodes, at"
    return (
        f"{seen} {address} within {where.join_timeout_s:.0f} s. Start the same command on every machine (--node-rank 0 "
        f"on the one that {where.master_addr} belongs to), and let them reach that port. --rdzv-conf join_timeout=SECONDS "
        "gives them more time."
    )


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _is_mine(host: str) -> bool:
    """Whether a name or address belongs to this machine."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as trial:
                trial.bind(address)
                return True
    return False
