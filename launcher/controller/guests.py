"""Guests keep what lost nodes had, and are read there: by the ranks of an attempt that cannot take the places of the one
before, or by who writes it to storage because there will be no attempt.

HostGuest, or Keep, to the members of the old stripes ──► where their keepers are reached ──► JoinStripe to all ──► joined
    ──► Rebuild to all ──► rebuilt: the snapshot is whole in the memory of those who are there, for ranks of any layout
    not possible, or not in time: an older snapshot is tried, then none, and the event log says what was lost
"""

import time
from collections.abc import Callable, Sequence
from typing import Literal

from evermesh.fault.snapshot.choosing import Version
from evermesh.launcher.controller.guest_plan import GuestPlan, plan_guests
from evermesh.launcher.controller.job import Job
from evermesh.launcher.controller.nodes import KeeperName, Node
from evermesh.launcher.controller.places import Call, Member, give_places
from evermesh.launcher.messages import HostGuest, Keep, KeeperTells, Rebuild
from evermesh.runtime.config import SnapshotConfig

_GATHER_S = 20.0
"""How long keepers may take to be there, and to take their old places."""
Stage = Literal["gathering", "joining", "rebuilding"]


class Guests:
    """The guests, if any, without which the newest snapshot is not whole, for the generation that the scribe has.

    Args:
        hosts: nodes that may have some.
        label: with which their names begin; none before had it.
        is_worth: says whether a snapshot is newer than all that is there without.
    """

    def __init__(self, job: Job, hosts: Sequence[str], label: str, is_worth: Callable[[Version], bool]) -> None:
        self._nodes, self._scribe, self._launch, self._workers = job.nodes, job.scribe, job.launch, job.config.workers
        self._hosts, self._label, self._is_worth = hosts, label, is_worth
        self._generation, self._snapshots = job.scribe.generation, job.config.train.snapshot or SnapshotConfig()
        self._in_vain: list[Version] = []
        self._failures: list[str] = []
        self._ports: dict[KeeperName, int] = {}
        self._stage: Stage = "gathering"
        self._pending: set[KeeperName] = set()
        """Who has not done yet what all are to do in this stage."""
        self._epoch = 0
        """Of the old places, as they were given last; 0: not yet."""
        self._deadline_s = 0.0
        self.is_under_way = self.has_failed = False
        """``has_failed``: nothing of what was to be rebuilt is there."""
        self._plan = self._wanted()

    @property
    def step(self) -> int | None:
        """Of the snapshot that is rebuilt, or is to be; None: there is none."""
        return self._plan.version.step if self._plan is not None else None

    @property
    def why_not(self) -> str:
        """Why snapshots could not be rebuilt; empty while nothing has failed."""
        return "; ".join(self._failures)

    def begin(self) -> None:
        """Call the members of the old stripes together, guests among them, where there is something to rebuild."""
        self.is_under_way = self._plan is not None
        if self._plan is None:
            return
        self._ports.clear()
        self._epoch = 0
        self._enter("gathering", _GATHER_S)
        for name in _ranks(self._plan):
            self._ask(name)

    def greet(self, node: Node) -> None:
        """A node is there, perhaps again: what it was told may be lost."""
        if self.is_under_way and self._plan is not None:
            for name in _ranks(self._plan):
                if name.node == node.name:
                    self._ask(name)

    def hear(self, node: Node, told: KeeperTells) -> None:
        """An agent tells of its keeper, or of one that it hosts."""
        name = KeeperName(node.name, told.guest)
        if self._plan is None or not self.is_under_way or name not in _ranks(self._plan):
            return
        if told.about != "listen" and told.epoch != self._epoch:
            return  # of a place that it had before
        if told.guest is None:
            node.remember(told.in_memory)
        elif told.in_memory is not None:
            self._nodes.guests[name] = told.in_memory
        if told.about != "standing" and not told.ok:
            self._fail(f"{name}: {told.text}")
        elif told.about == "listen" and told.port is not None:
            self._ports[name] = told.port
            self._pending.discard(name)
            if len(self._ports) == len(_ranks(self._plan)):
                self._give_places(self._plan)
        elif told.about == "join" and self._is_done_by(name, "joining"):
            self._rebuild(self._plan)
        elif told.about == "rebuild" and self._is_done_by(name, "rebuilding"):
            self._end(self._plan)

    def look(self) -> None:
        """Called now and then: what takes too long is not waited for."""
        if self.is_under_way and time.monotonic() > self._deadline_s:
            self._fail(f"{', '.join(sorted(map(str, self._pending)))} took too long")

    def give_up(self) -> None:
        """Nobody waits for what is under way."""
        if self.is_under_way and self._plan is not None:
            self.is_under_way = False
            self._nodes.end_guests(self._plan.guests)

    def _wanted(self) -> GuestPlan | None:
        """The newest snapshot that is had only with guests, if it is worth it."""
        memories = self._nodes.memories(self._launch)
        hosts = sorted(self._hosts, key=lambda name: -self._nodes[name].room_bytes)
        label = f"{self._label}-{len(self._in_vain)}"  # what the guests before say late is of no other
        plan = plan_guests(memories, hosts, label, self._workers, self._in_vain)
        return plan if plan is not None and self._is_worth(plan.version) else None

    def _enter(self, stage: Stage, limit_s: float) -> None:
        assert self._plan is not None
        self._stage, self._pending = stage, set(_ranks(self._plan))
        self._deadline_s = time.monotonic() + limit_s

    def _is_done_by(self, name: KeeperName, stage: Stage) -> bool:
        """Whether all have done what they are to do in this stage, now that ``name`` has."""
        self._pending.discard(name)
        return self._stage == stage and not self._pending

    def _ask(self, name: KeeperName) -> None:
        """Have this keeper, where others can reach it; one that was there already says so again."""
        assert self._plan is not None
        launch, version = self._launch, self._plan.version
        if name.guest is None:
            self._nodes[name.node].send(Keep(generation=self._generation, launch=launch))
            return
        order = HostGuest(
            generation=self._generation,
            launch=launch,
            guest=name.guest,
            version=version,
            ranks=_ranks(self._plan)[name],
        )
        self._nodes[name.node].send(order)

    def _give_places(self, plan: GuestPlan) -> None:
        """Give all their old places; what they do for others is given up."""
        reason = "; ".join(map(str, plan.stripes))
        self._epoch = self._scribe.note("guests", reason, guests=[str(name) for name in plan.guests])
        self._enter("joining", _GATHER_S)
        for stripe in plan.stripes:
            told = stripe.protected
            call = Call(self._generation, self._epoch, told.stripe, told.code, self._snapshots.bytes_per_s)
            members = [Member(name, self._ports[name], stripe.ranks(i)) for i, name in enumerate(stripe.members)]
            give_places(self._nodes, call, members)

    def _rebuild(self, plan: GuestPlan) -> None:
        timeout_s = self._snapshots.rebuild_timeout_s
        self._enter("rebuilding", timeout_s + _GATHER_S)  # agents have told by then that it is over
        for stripe in plan.stripes:
            for name in stripe.members:
                order = Rebuild(
                    generation=self._generation,
                    guest=name.guest,
                    epoch=self._epoch,
                    protected=stripe.protected,
                    timeout_s=timeout_s,
                )
                self._nodes[name.node].send(order)

    def _end(self, plan: GuestPlan) -> None:
        self.is_under_way = False
        kept = "; ".join(f"{name} keeps what ranks {_told(ranks)} had" for name, ranks in plan.guests.items())
        text = (
            f"step {plan.version.step} was rebuilt from memory by {'; '.join(map(str, plan.stripes))}. "
            f"{kept or 'Nobody is a guest'}, for as long as it is needed"
        )
        self._scribe.tell("snapshot rebuilt", text, step=plan.version.step, guests=len(plan.guests))

    def _fail(self, why: str) -> None:
        """Try an older snapshot, if there is one; else ranks start with what there is without."""
        assert self._plan is not None
        failed = self._plan
        self._failures.append(f"step {failed.version.step}: {why}")
        self._in_vain.append(failed.version)
        self._nodes.end_guests(failed.guests)
        self._plan = self._wanted()
        if self._plan is None:
            self.has_failed = True
            text = f"step {failed.version.step} was in memory, and cannot be rebuilt with guests: {self.why_not}"
            self._scribe.tell("snapshot lost", text, step=failed.version.step)
        self.begin()


def _ranks(plan: GuestPlan) -> dict[KeeperName, tuple[int, ...]]:
    """Who takes part, with the ranks whose parts he keeps."""
    return {name: stripe.ranks(member) for stripe in plan.stripes for member, name in enumerate(stripe.members)}


def _told(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
