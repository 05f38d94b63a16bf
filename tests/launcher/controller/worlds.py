"""A controller with agents that are only told of: no process, no network, and a clock that the test sets.

Agents behave as the real ones do (see ``launcher/agent/agent.py``): they do nothing that an older generation asks for,
and tell everything again when they are connected.
"""

import asyncio
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from pydantic import BaseModel

from evermesh.fault.hardware.model import NodeHardware
from evermesh.fault.health.verdicts import Verdict
from evermesh.launcher import Run
from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.controller import Controller
from evermesh.launcher.controller.journal import Journal
from evermesh.launcher.controller.nodes import Node
from evermesh.launcher.controller.status import ENDED
from evermesh.launcher.messages import (
    Ask,
    Beat,
    End,
    EndGuest,
    FromAgent,
    HealthTold,
    Hello,
    HostGuest,
    InMemory,
    JoinStripe,
    Keep,
    KeeperTells,
    Leave,
    OpenStore,
    Outcome,
    Place,
    Progress,
    RankBeat,
    Rebuild,
    SnapshotPart,
    Start,
    Started,
    Store,
    StoreOpened,
    ToAgentAdapter,
)
from evermesh.launcher.policy import Failure

_CLOCKED = ("controller", "guests", "job", "life", "nodes", "record", "stripes")
START_S = 1000.0
_PIDS = itertools.count(100)


@dataclass
class Ranks:
    """The ranks of one generation on one node."""

    generation: int
    place: Place
    settings: dict[str, str] = field(default_factory=dict)
    step: int = 0
    asked: str | None = None
    """To stop, or to regroup."""
    is_over: bool = False
    failures: list[Failure] = field(default_factory=list)
    done: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def outcome(self) -> Outcome:
        return Outcome(generation=self.generation, done=self.done, failures=tuple(self.failures), is_over=self.is_over)


class Agent:
    """One agent, as far as the controller can tell."""

    def __init__(self, world: "World", name: str) -> None:
        self.world, self.name, self.pid = world, name, next(_PIDS)
        self.ranks: Ranks | None = None
        self.is_alive = True
        self.memory: InMemory | None = None
        """What its keeper holds."""
        self.guests: dict[str, InMemory] = {}
        self.hosted: dict[str, tuple[int, ...]] = {}
        """The ranks of guests."""
        self.cannot_rebuild: set[int] = set()
        """Steps."""
        self.shared_memory_free_bytes: int | None = None
        self.verdicts: tuple[Verdict, ...] = ()
        """What it finds out about its node."""
        self.hardware: NodeHardware | None = None
        self.address = "127.0.0.1"
        self.ignores: tuple[type[BaseModel], ...] = ()
        """What it does not answer."""
        self.node: Node | None = None
        """Of the controller; None while there is no connection."""
        self.inbox: asyncio.Queue[str] = asyncio.Queue()

    @property
    def has_living_ranks(self) -> bool:
        return self.is_alive and self.ranks is not None and not self.ranks.is_over

    def connect(self) -> None:
        """Say hello, unless it is connected or dead."""
        if not self.is_alive or self.node is not None:
            return
        self.inbox = asyncio.Queue()
        hello = Hello(
            node=self.name,
            host="here",
            address=self.address,
            pid=self.pid,
            outcome=self.ranks and self.ranks.outcome,
            in_memory=self.memory,
            guests=self.guests,
            verdicts=self.verdicts,
            hardware=self.hardware,
        )
        with suppress(OSError):  # the connection ends, and the agent tries again
            self.node = self.world.controller.greet(self.name, hello, self.inbox)

    def cut(self) -> None:
        """Lose the connection, and with it what was on its way."""
        if self.node is not None:
            self.world.controller.part(self.node, self.inbox)
            self.node = None

    def say(self, message: FromAgent) -> None:
        if self.node is not None:
            try:
                self.world.controller.receive(self.node, message)
            except OSError:
                self.cut()

    def find_out(self, *verdicts: Verdict) -> None:
        """Tell what is known of the node by now."""
        self.verdicts = verdicts
        self.say(HealthTold(verdicts=verdicts))

    def beat(self) -> None:
        """Tell how far the ranks are."""
        beats: tuple[RankBeat, ...] = ()
        if self.ranks is not None:
            place = self.ranks.place
            beats = tuple(
                RankBeat(rank=place.first_rank + i, pid=1, step=self.ranks.step, step_s=0.1, compute_s=0.1)
                for i in range(place.ranks)
            )
        generation = self.ranks.generation if self.ranks else 0
        free = self.shared_memory_free_bytes
        self.say(Beat(generation=generation, ranks=beats, memory_free_bytes=8, shared_memory_free_bytes=free))

    def take(self) -> bool:
        """Do what the oldest message asks for; whether there was one."""
        if self.node is None or self.inbox.empty():
            return False
        message = ToAgentAdapter.validate_json(self.inbox.get_nowait())
        if self.ranks is not None and getattr(message, "generation", 1 << 60) < self.ranks.generation:
            return True
        if isinstance(message, self.ignores):
            return True
        match message:
            case Keep():
                told = KeeperTells(generation=message.generation, about="listen", ok=True, port=self.pid)
                self.say(told.model_copy(update={"in_memory": self.memory}))
            case HostGuest():
                self.guests[message.guest], self.hosted[message.guest] = InMemory(launch=message.launch), message.ranks
                told = KeeperTells(generation=message.generation, about="listen", ok=True, port=self.pid)
                self.say(told.model_copy(update={"guest": message.guest}))
            case JoinStripe():
                told = KeeperTells(generation=message.generation, epoch=message.epoch, about="join", ok=True)
                self.say(told.model_copy(update={"guest": message.guest}))
            case Rebuild():
                self.say(self._rebuilt(message))
            case EndGuest():
                self.guests.pop(message.guest, None)
            case OpenStore():
                self.say(StoreOpened(generation=message.generation, store=Store(host="127.0.0.1", port=1)))
            case Start() if self.ranks is None or self.ranks.generation != message.generation:
                self.ranks = Ranks(message.generation, message.place, message.settings)
                self.say(Started(generation=message.generation, pids={}))
            case Ask() if self.ranks is not None and message.what != "save":
                self.ranks.asked = message.what if self.ranks.asked != "stop" else "stop"
            case End():
                if self.ranks is not None:
                    self.ranks.is_over = True
                self.say(Progress(outcome=Outcome(generation=message.generation, is_over=True)))
            case Leave():
                self.die()
        return True

    def _rebuilt(self, order: Rebuild) -> KeeperTells:
        """The keeper of the node, or a guest, has its part, or says that it cannot."""
        generation, step, shard_map = order.protected.version
        if step in self.cannot_rebuild:
            told = KeeperTells(
                generation=order.generation, epoch=order.epoch, about="rebuild", ok=False, text="no room"
            )
            return told.model_copy(update={"guest": order.guest})
        if order.guest is not None:
            parts = tuple(
                SnapshotPart(rank=rank, generation=generation, step=step, shard_map=shard_map)
                for rank in self.hosted[order.guest]
            )
            self.guests[order.guest] = self.guests[order.guest].model_copy(update={"parts": parts})
        found = self.memory if order.guest is None else self.guests[order.guest]
        told = KeeperTells(generation=order.generation, epoch=order.epoch, about="rebuild", ok=True, in_memory=found)
        return told.model_copy(update={"guest": order.guest})

    def fail(self, *, peer_lost: bool) -> None:
        """The first rank raises."""
        if self.ranks is not None and self.has_living_ranks:
            rank = self.ranks.place.first_rank
            failure = Failure(rank=rank, time_s=self.world.now_s, how="failed: x", cause="died", peer_lost=peer_lost)
            self.ranks.failures.append(failure)
            self.say(Progress(outcome=self.ranks.outcome))

    def finish(self, reason: str) -> None:
        """All ranks return, and are gone."""
        if self.ranks is not None and self.has_living_ranks:
            place = self.ranks.place
            self.ranks.done = {place.first_rank + i: {"reason": reason} for i in range(place.ranks)}
            self.ranks.is_over = True
            self.say(Progress(outcome=self.ranks.outcome))

    def die(self) -> None:
        """The process is killed, and its ranks with it."""
        self.cut()
        self.is_alive = False


class World:
    """A run on two nodes and a spare."""

    def __init__(self, run: Run, config: JobConfig) -> None:
        self.run, self.config = run, config
        self.now_s = START_S
        self.agents: dict[str, Agent] = {}
        self.absent: set[str] = set()
        """Nodes whose agents do not come."""
        self.address = "127.0.0.1"
        self.journal = Journal(run.journal)
        self.controllers: list[Controller] = []
        self.controller = self._control()

    def revive(self) -> None:
        """Kill the controller and start another, as an agent does while the run counts as running."""
        if self.run.state().state != "running":
            return
        for agent in self.agents.values():
            agent.node = None
        self.journal.__exit__()
        self.journal = Journal(self.run.journal)
        self.controller = self._control()

    def advance(self, seconds: float = 0.0) -> None:
        """Let time pass, and the controller do what follows."""
        self.now_s += seconds
        if self.controller.state in ENDED:
            return
        with suppress(OSError):  # as the controller does: what was not done is tried again
            self.controller._advance()

    def settle(self, seconds: float) -> None:
        """Everybody is connected and answers for a while."""
        for _ in range(round(seconds / 0.25)):
            for agent in [agent for name, agent in self.agents.items() if name not in self.absent]:
                agent.connect()
                while agent.take():
                    pass
                agent.beat()
            self.advance(0.25)

    # the place of the agents

    def start(self, nodes: Sequence[str]) -> None:
        for node in nodes:
            if node not in self.agents or not self.agents[node].is_alive:
                self.agents[node] = Agent(self, node)

    def adopt(self, pids: dict[str, int]) -> None:
        assert all(pid <= self.agents[node].pid for node, pid in pids.items())

    def is_alive(self, node: str) -> bool | None:
        return self.agents[node].is_alive

    def replace(self, node: str) -> bool:
        self.agents[node].die()
        self.start([node])
        return True

    def shortage(self) -> str:
        return ""

    def time_left_s(self) -> float | None:
        return None

    def end(self, joining: Sequence[str] = ()) -> None:
        for agent in self.agents.values():
            agent.die()

    def _control(self) -> Controller:
        controller = Controller(self.run, self.config, self.journal, self)
        self.controllers.append(controller)
        controller._take_over()
        return controller


@contextmanager
def world(**changes: Any) -> Iterator[World]:
    """A world whose clock only the test moves."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        values = {
            "runs": folder, "cluster": f"{folder}/cluster", "workers": 2, "nodes": 2, "spares": 1, "restarts": 50,
            "train": {
                "model": {"hidden": 16, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 32},
                "data": {"sources": [{"kind": "corpus", "path": "nowhere"}], "context": 256, "batch_tokens": 1024},
                "layout": {"capacity": 160},
            },
        }  # fmt: skip
        config = JobConfig.model_validate(values | changes)
        run = Run.create(config)
        made: list[World] = []
        clock = SimpleNamespace(monotonic=lambda: made[0].now_s if made else START_S, time=time.time)
        with ExitStack() as patches:
            for module in _CLOCKED:
                patches.enter_context(mock.patch(f"evermesh.launcher.controller.{module}.time", clock))
            made.append(World(run, config))
            try:
                yield made[0]
            finally:
                made[0].journal.__exit__()
                for controller in made[0].controllers:
                    controller.isolation.close()  # nobody writes into a folder that is gone
