"""Has the keepers of an attempt protect each other's snapshots, and what was lost rebuilt before its ranks start.

Keep to every node ──► where its keeper is reached ──► JoinStripe to all of a stripe ──► joined
    nobody lacks anything: ranks start at once, and all that happens meanwhile
    else: what all hold by now ──► Rebuild to the stripes in which somebody lacks his part ──► rebuilt ──► ranks start
    not possible, or not in time: ranks start from storage, and the event log says what was lost
"""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from evermesh.fault.snapshot.choosing import Version
from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.in_memory import job_groups, memories_of
from evermesh.launcher.controller.life import Life
from evermesh.launcher.controller.nodes import Node, Nodes
from evermesh.launcher.controller.places import Places
from evermesh.launcher.controller.protection import Protection
from evermesh.launcher.controller.recovery import (
    Group,
    Recovery,
    complete_version,
    find_recovery,
    lacking,
    newest_known,
)
from evermesh.launcher.controller.scribe import Scribe
from evermesh.launcher.controller.status import Standing
from evermesh.launcher.messages import InMemory, KeeperTells, LeaveStripe, Rebuild
from evermesh.runtime.config import SnapshotConfig

_GATHER_S = 20.0
"""How long keepers may take to be there, and to take their places, before storage is read instead."""
_TRIES = 2
"""Of one snapshot: a keeper that dies meanwhile is started again by its agent."""
Stage = Literal["gathering", "rebuilding", "ready"]


class Stripes:
    """The stripes of one attempt. ``newest_saved`` is the step of the newest checkpoint: older snapshots are not rebuilt."""

    def __init__(
        self, nodes: Nodes, life: Life, config: JobConfig, scribe: Scribe, launch: str, newest_saved: int | None
    ) -> None:
        self._nodes, self._life, self._scribe, self._launch = nodes, life, scribe, launch
        self._newest_saved = -1 if newest_saved is None else newest_saved
        self._config, self._groups = config.train.snapshot or SnapshotConfig(), job_groups(config, len(life.nodes))
        self._places = Places(nodes, life, self._groups, scribe, self._config.bytes_per_s)
        self._protection = Protection(scribe)
        self._pending: set[str] = set()
        """Nodes that are rebuilding."""
        self._tries: Counter[Version] = Counter()
        self._under_way: Recovery | None = None
        self._failures: list[str] = []
        self._is_on = any(group.code is not None for group in self._groups)
        is_unknown = life.is_taken_over and not life.has_stepped  # whether it still has to be rebuilt
        self.stage: Stage = "gathering" if self._is_on and (is_unknown or self._needs_more()) else "ready"
        self._deadline_s = time.monotonic() + _GATHER_S
        self.has_failed = False
        """What was lost was not rebuilt."""

    @property
    def are_ready(self) -> bool:
        """Whether ranks may start."""
        return self.stage == "ready"

    def remembered(self) -> int | None:
        """Step of the newest snapshot that all nodes hold now; None: there is none."""
        whole = Group(0, tuple(range(len(self._life.nodes))), None)
        found = find_recovery((whole,), self._memories(), self._life.ranks_per_node)
        return found.version.step if found is not None else None

    @property
    def protection(self) -> Standing:
        """Whether the newest snapshot is protected."""
        return self._protection.standing([group.number for group in self._groups]) if self._is_on else "none"

    def begin(self) -> None:
        """Ask all nodes for their keepers, or have them leave the stripes of an attempt on more nodes."""
        for node in self._nodes:
            self.greet(node)

    def greet(self, node: Node) -> None:
        """A node is there, perhaps again. The keeper of a spare is started before it is needed."""
        if self._is_on:
            self._places.ask(node.name, self._launch)
        elif node.name in self._life.nodes:
            node.send(LeaveStripe(generation=self._scribe.generation))

    def hear(self, node: Node, told: KeeperTells) -> None:
        """An agent tells of its keeper."""
        if not self._is_on or node.name not in self._life.nodes:
            return
        node.remember(told.in_memory)
        if told.about != "listen" and told.epoch != self._places.epoch_of(self._places.group_of(node.name)):
            return  # of a place that it had before
        match told.about:
            case "listen" if told.port is not None:
                if self._places.take_port(node.name, told.port):
                    text = "its keeper died; another one has taken its place"
                    self._note(node.name, told.model_copy(update={"ok": False, "text": text}))
            case "join" if told.ok:
                self._places.note_joined(node.name)
            case "listen" | "join":
                self._places.missing[node.name] = told.text
                self._note(node.name, told)
            case "rebuild":
                self._take_rebuilt(node.name, told)
            case "standing":
                self._note(node.name, told)
        self._go_on()

    def look(self) -> None:
        """Called now and then: what takes too long is not waited for."""
        if self.stage != "ready" and time.monotonic() > self._deadline_s:
            self._fail(f"{', '.join(self._places.awaited or sorted(self._pending))} took too long")

    def _note(self, name: str, told: KeeperTells) -> None:
        self._protection.note(self._places.named(self._places.group_of(name)), name, told)

    def _go_on(self) -> None:
        """Rebuild what is lacking, once all keepers stand still and have told what they hold."""
        if self.stage != "gathering":
            return
        if self._life.is_started:  # an earlier controller has seen to it
            self.stage = "ready"
            return
        if self._places.awaited:
            return
        found = self._wanted()
        if self._newest() is None or (found is not None and not found.rebuild):
            self.stage = "ready"
        elif found is None or self._places.blocked & found.rebuild.keys():
            self._fail("; ".join(f"{name}: {text}" for name, text in self._places.missing.items()))
        else:
            self._rebuild(found)

    def _rebuild(self, found: Recovery) -> None:
        self.stage, self._under_way = "rebuilding", found
        timeout_s = self._config.rebuild_timeout_s
        self._deadline_s = time.monotonic() + timeout_s + _GATHER_S  # agents have told by then that it is over
        self._tries[found.version] += 1
        self._failures.clear()
        for number, protected in found.rebuild.items():
            epoch = self._places.epoch_of(self._groups[number])
            assert epoch is not None, "all have joined"
            generation = self._scribe.generation
            order = Rebuild(generation=generation, epoch=epoch, protected=protected, timeout_s=timeout_s)
            for name in self._places.named(self._groups[number]).nodes:
                self._pending.add(name)
                self._nodes[name].send(order)

    def _take_rebuilt(self, name: str, told: KeeperTells) -> None:
        if name not in self._pending or self._under_way is None:
            return
        self._pending.discard(name)
        if not told.ok:
            self._failures.append(f"{name}: {told.text}")
        if self._pending:
            return
        if self._failures:  # with new places, this snapshot or an older one
            self.stage, self._deadline_s = "gathering", time.monotonic() + _GATHER_S
            self._places.give_all()
        else:
            self.stage = "ready"
            self._tell_rebuilt(self._under_way)

    def _wanted(self) -> Recovery | None:
        """The newest snapshot that is worth it."""
        in_vain = [version for version, tries in self._tries.items() if tries >= _TRIES]
        found = find_recovery(self._groups, self._memories(), self._life.ranks_per_node, in_vain)
        return found if found is not None and found.version.step >= self._newest_saved else None

    def _needs_more(self) -> bool:
        """Whether the ranks would find less in the memory of their nodes than there is to be had, or was."""
        newest = self._newest()
        if newest is None or newest.step < self._newest_saved:
            return False
        found = self._wanted()
        if found is None:  # lost, unless it was just never finished
            return not all(memory and memory.parts for memory in self._memories())
        return bool(found.rebuild)

    def _newest(self) -> Version | None:
        """The newest snapshot of as many ranks that any node knows; None: there is none, or a newer one of other ranks is
        whole, which the slots of this one may still hold."""
        newest = newest_known(self._memories(), self._life.ranks_per_node)
        whole = complete_version(self._nodes.memories(self._launch).values(), self._life.world_size)
        return None if newest is None or (whole is not None and newest < whole) else newest

    def _memories(self) -> Sequence[InMemory | None]:
        return memories_of(self._nodes, self._life.nodes, self._launch)

    def _fail(self, why: str) -> None:
        """Ranks start with what is in storage, or with an older snapshot of all of them."""
        was_rebuilding, self.stage, self.has_failed = self.stage == "rebuilding", "ready", True
        if was_rebuilding:
            self._places.give_all()  # so that keepers leave the slots alone
        newest = newest_known(self._memories(), self._life.ranks_per_node)
        told = [self._told_loss(group, newest) for group in self._groups if newest is not None]
        reasons = [*filter(None, told), *filter(None, [why]), *self._failures]
        step = newest.step if newest else None
        text = f"step {step} was in memory, and cannot be rebuilt: {'; '.join(reasons)}"
        self._scribe.tell("snapshot lost", text, step=step)

    def _told_loss(self, group: Group, newest: Version) -> str:
        places = lacking(group, self._memories(), self._life.ranks_per_node, newest)
        names = ", ".join(self._life.nodes[place] for place in places)
        covered = f"it makes up for {group.tolerated} lost nodes"
        return f"{self._places.named(group)} has lost what {names} had; {covered}" if names else ""

    def _tell_rebuilt(self, done: Recovery) -> None:
        names = [str(self._places.named(self._groups[number])) for number in done.rebuild]
        text = f"step {done.version.step} was rebuilt from memory by {'; '.join(names)}"
        self._scribe.tell("snapshot rebuilt", text, step=done.version.step)
