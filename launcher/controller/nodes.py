"""What the controller knows of its nodes, and how it talks to their agents."""

import asyncio
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pydantic import BaseModel

from evermesh.fault.cluster.identity import NodeIdentity
from evermesh.fault.hardware.model import NodeHardware
from evermesh.fault.health.verdicts import Verdict
from evermesh.launcher.controller.leases import LEASE_S, NodeSigns, node_state
from evermesh.launcher.controller.machine import NodeState
from evermesh.launcher.controller.status import NodeStatus
from evermesh.launcher.messages import Beat, EndGuest, Hello, InMemory, KeeperAt
from evermesh.launcher.succession.protocol import Seat
from evermesh.parallelism.fabric.cards import Setting

_PROVING_STEPS = 2
"""The first step after a node fell silent may have been nearly over by then."""


class KeeperName(NamedTuple):
    """A keeper: that of a node, or a guest that the node hosts in the place of one that was lost."""

    node: str
    guest: str | None = None

    def __str__(self) -> str:
        return self.node if self.guest is None else f"{self.guest} on {self.node}"


class Wire(Protocol):
    """A WebSocket to an agent, as far as it is needed here."""

    async def send_text(self, data: str) -> None:
        """Send one message."""


@dataclass(slots=True)
class Node:
    """One node and what was last heard of it."""

    name: str
    state: NodeState = "joining"
    host: str = ""
    address: str = ""
    pid: int | None = None
    heard_s: float = field(default_factory=lambda: time.monotonic())
    proof_s: float = field(default_factory=lambda: time.monotonic())
    """Monotonic clock: when there was proof last that its ranks live."""
    steps_since_heard: int = 0
    outbox: "asyncio.Queue[str] | None" = None
    """What is to be sent to it; None while it is not connected."""
    memory_free_bytes: int | None = None
    shared_memory_free_bytes: int | None = None
    shared_memory_bytes: int | None = None
    snapshot_bytes: int = 0
    in_memory: InMemory | None = None
    """Snapshots that its ranks have left there, when it was last told."""
    keeper: KeeperAt | None = None
    """Where others read them; it may live when its agent does not."""
    seat: Seat | None = None
    """Where its agent is asked about the journal."""
    is_head: bool = False
    metrics: str | None = None
    """Host and port where its agent serves numbers of it."""
    verdicts: tuple[Verdict, ...] = ()
    """What was last told of its health."""

    @property
    def unfit_because(self) -> str:
        """What speaks against using it, in sentences; empty if nothing does."""
        return " ".join(verdict.told for verdict in self.verdicts if verdict.state == "bad")

    identity: NodeIdentity | None = None
    """As the cluster store knows it."""
    hardware: NodeHardware | None = None
    """Its network cards, GPUs and rack, as its agent tells."""

    @property
    def room_bytes(self) -> int:
        """For more snapshots: what is left of shared memory, which may be promised more than there is memory."""
        told = (self.memory_free_bytes, self.shared_memory_free_bytes)
        return min((num_bytes for num_bytes in told if num_bytes is not None), default=0)

    def send(self, message: BaseModel) -> None:
        """Send ``message`` soon. Without a connection it is dropped: who connects is told all again."""
        if self.outbox is not None:
            self.outbox.put_nowait(message.model_dump_json())

    def remember(self, told: InMemory | None) -> None:
        """Take what its agent tells of its memory, if it does."""
        self.in_memory = told or self.in_memory
        self.keeper = (told.keeper if told is not None else None) or self.keeper

    def take(self, beat: Beat) -> None:
        """Take what its agent tells of its machine."""
        self.memory_free_bytes, self.snapshot_bytes = beat.memory_free_bytes, beat.snapshot_bytes
        self.shared_memory_free_bytes = beat.shared_memory_free_bytes
        self.keeper = beat.keeper or self.keeper

    def hear(self) -> None:
        """Note that something came from it."""
        self.heard_s = self.proof_s = time.monotonic()
        self.steps_since_heard = 0


class Nodes:
    """All nodes of a job, by name."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}
        self.guests: dict[KeeperName, InMemory] = {}
        """What keepers hold that stand for lost ones."""
        self.last_step = 0
        """The highest step that any rank of the attempt was seen to have finished."""

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def __getitem__(self, name: str) -> Node:
        return self._nodes.setdefault(name, Node(name))

    def expect(self, name: str) -> None:
        """Count ``name`` as joining: an agent was started for it. A keeper may have outlived the one before."""
        self._nodes[name] = Node(name, keeper=self[name].keeper, identity=self[name].identity)

    def states(self) -> dict[str, NodeState]:
        """State of every node, in the order in which they were named."""
        return {name: self._nodes[name].state for name in sorted(self._nodes, key=_natural)}

    def greet(self, hello: Hello) -> bool:
        """Take a node's word for who it is; whether its agent is another one than before."""
        node = self[hello.node]
        is_new = node.pid is not None and node.pid != hello.pid
        node.host, node.address, node.pid = hello.host, hello.address, hello.pid
        node.shared_memory_bytes = hello.shared_memory_bytes
        node.seat, node.is_head, node.metrics = hello.seat, hello.is_head, hello.metrics
        node.identity = hello.identity or NodeIdentity(name=f"{hello.host}/{hello.node}")
        node.hardware = hello.hardware or node.hardware
        node.state = "ready"
        node.hear()
        self.guests = {name: found for name, found in self.guests.items() if name.node != hello.node}
        self.guests |= {KeeperName(hello.node, guest): found for guest, found in hello.guests.items()}
        return is_new

    @property
    def keepers(self) -> tuple[KeeperAt, ...]:
        """Whom ranks may ask for snapshots; some may be gone."""
        own = [node.keeper for node in self]
        return tuple(filter(None, (*own, *(found.keeper for found in self.guests.values()))))

    @property
    def refused(self) -> str:
        """Which nodes are refused, and why, in sentences; empty if none is."""
        found = [node for node in self if node.state == "refused"]
        return " ".join(f"{node.name} ({node.host}) was refused: {node.unfit_because}" for node in found)

    def memories(self, launch: str) -> dict[KeeperName, InMemory]:
        """What the keepers hold of a launch whose nodes are there, with their guests."""
        told = {KeeperName(node.name): node.in_memory for node in self} | self.guests
        return {
            name: found
            for name, found in told.items()
            if found is not None and found.launch == launch and self[name.node].state in ("ready", "refused")
        }

    def end_guests(self, names: Collection[KeeperName]) -> None:
        """Give back what these keep."""
        for name in names:
            self.guests.pop(name, None)
            if name.guest is not None:
                self[name.node].send(EndGuest(guest=name.guest))

    def note_step(self, step: int) -> None:
        """All ranks have finished ``step``, for they do it together."""
        if step <= self.last_step:
            return
        for node in self:
            node.steps_since_heard += 1
            if node.steps_since_heard >= _PROVING_STEPS:
                node.proof_s = time.monotonic()
        self.last_step = step

    def judge(self, node: Node, process_lives: bool | None, step_s: float) -> NodeState:
        """What the signs say of ``node`` now; none but its agent can make it ready."""
        if node.state == "lost" or (node.state == "joining" and process_lives is not False):
            return node.state
        now_s = time.monotonic()
        found = node_state(NodeSigns(now_s - node.heard_s, now_s - node.proof_s, process_lives, step_s))
        stays = {"refused": found != "lost", "cut off": found == "ready"}
        return node.state if stays.get(node.state, False) else found


def node_status(
    node: Node,
    ranks: tuple[int, ...],
    is_spare: bool,
    aside: str | None = None,
    settings: tuple[Setting, ...] = (),
) -> NodeStatus:
    """What is told about ``node``."""
    left_s = None if node.state == "joining" else max(0.0, node.heard_s + LEASE_S - time.monotonic())
    return NodeStatus(
        node=node.name,
        host=node.host,
        address=node.address,
        pid=node.pid,
        state=node.state,
        is_spare=is_spare and aside is None,
        known_as=node.identity.name if node.identity is not None else None,
        aside=aside,
        lease_left_s=left_s,
        ranks=ranks,
        memory_free_bytes=node.memory_free_bytes,
        shared_memory_bytes=node.shared_memory_bytes,
        snapshot_bytes=node.snapshot_bytes,
        hardware=node.hardware,
        settings=settings,
    )


def _natural(name: str) -> tuple[str, int]:
    digits = "".join(filter(str.isdigit, name))
    return name.rstrip("0123456789"), int(digits or 0)
