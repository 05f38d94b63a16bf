"""A job as its controller knows it: what was asked for, what the journal tells, its nodes, and the attempt that lives."""

import time
from typing import Any

from evermesh.launcher.config import JobConfig
from evermesh.launcher.contact import keeper_secret, read_token
from evermesh.launcher.controller.in_memory import job_groups
from evermesh.launcher.controller.journal import Journal
from evermesh.launcher.controller.life import Life
from evermesh.launcher.controller.machine import JobView, Transition, size_of_attempt
from evermesh.launcher.controller.network import Network, told_settings
from evermesh.launcher.controller.racks import lost_rack
from evermesh.launcher.controller.record import replay
from evermesh.launcher.controller.roster import Roster
from evermesh.launcher.controller.scribe import Scribe
from evermesh.launcher.controller.seats import Asked, seat_nodes
from evermesh.launcher.controller.status import JobState
from evermesh.launcher.controller.work import launch_of
from evermesh.launcher.elastic import node_counts
from evermesh.launcher.errors import LayoutRequestInvalid
from evermesh.launcher.messages import Store, ToAgent
from evermesh.launcher.placement import Placement
from evermesh.launcher.run_directory import Run
from evermesh.launcher.succession.office import Office
from evermesh.launcher.topology_file import read_topology
from evermesh.parallelism.fabric.cards import Setting
from evermesh.parallelism.topology import Topology
from evermesh.runtime.telemetry import StepReport

_GRACE_S = 3.0
"""Agents may be in the middle of asking a controller that was stopped; that takes 2 s."""


class Job:
    """The job of ``run``, shared by all who act for it. Agents that live are found, and others are started, when this is
    made. ``office`` is the term of its controller; None: nobody could take over."""

    def __init__(
        self, run: Run, config: JobConfig, journal: Journal, placement: Placement, office: Office | None
    ) -> None:
        self.run, self.config = run, config
        self.scribe = Scribe(run, journal, config.workers)
        names = [f"node-{number}" for number in range(config.nodes + config.spares)]
        self.roster = Roster(run, names, placement, self.scribe)
        self.nodes = self.roster.nodes
        self.network = Network(config, self.nodes, _topology(config))
        self.settings: dict[str, tuple[Setting, ...]] = {}
        """By node of the attempt: what NCCL and gloo are told there."""
        self._warned = ""
        self.last_report: StepReport | None = None
        self.reported_s = time.monotonic()
        """When that came."""
        self.plan: dict[str, Any] | None = None
        self.store: Store | None = None
        """Where the ranks of the attempt meet."""
        self.fewer_nodes = node_counts(config)[1:]
        is_revived = run.state().state == "running"
        if not is_revived:
            generation = journal.entries[-1].generation if journal.entries else run.state().attempt
            journal.append(generation, "launch", f"{config.workers} workers, {config.nodes} nodes", on=config.on)
        self.record = replay(journal.entries)
        self._began_s, self._failed_before = time.monotonic(), len(self.record.history)
        """What this controller has seen fail, and in which time: of an earlier one only a clock on the wall could tell."""
        self.scribe.generation = self.record.generation
        if office is not None and office.term != self.record.term:
            self.scribe.note("term", office.reason, term=office.term, node=office.node)
            self.record.term = office.term
        self.life = Life.from_record(self.record, config)
        self._since_s = time.monotonic()
        """When it came into its state."""
        self.aside: dict[str, str] = {}
        """Nodes that no other attempt is to use, and why."""
        self.suspected: dict[str, float] = {}
        """Nodes that may be used, and the probability that they are at fault."""
        self._size: int | None = None
        """Nodes that an attempt could have now, and since when."""
        self._size_since_s = time.monotonic()
        self.roster.find(self.record.pids if is_revived else {}, 0.0 if office is None else _GRACE_S)

    @property
    def state(self) -> JobState:
        return self.record.state

    @property
    def generation(self) -> int:
        return self.record.generation

    @property
    def launch(self) -> str:
        """What keepers know it by."""
        return launch_of(self.record.started_s)

    @property
    def keeper_secret(self) -> bytes:
        """By which keepers know who may read."""
        return keeper_secret(read_token(self.run.directory), self.launch)

    @property
    def is_between_attempts(self) -> bool:
        """Whether no rank is there that could save."""
        return self.life is not None and (self.life.view().has_regrouped or not self.life.is_started)

    @property
    def lost_rack(self) -> str | None:
        """What the loss of one rack would cost; None if that is survived, or nothing is known of racks."""
        if self.life is None or not self.config.racks:
            return None
        groups = job_groups(self.config, len(self.life.nodes))
        return lost_rack(self.life.nodes, self.network.racks, groups)

    @property
    def seen(self) -> dict[str, float]:
        """What this controller has seen fail, in how many seconds."""
        failures = len(self.record.history) - self._failed_before
        return {"failures": failures, "running_s": time.monotonic() - self._began_s}

    def in_order(self, chosen: tuple[str, ...]) -> tuple[str, ...]:
        """The nodes of the next attempt by place: apart as far as they can be, and near those to whom they send most."""
        ready = [name for name, state in self.view().spares_first.items() if state == "ready"]
        before, groups = self.life.nodes if self.life else (), job_groups(self.config, len(chosen))
        found = seat_nodes(Asked(chosen, before, ready, self.suspected), self.network, groups)
        if found.told:
            self.scribe.tell("nodes ordered", found.told, nodes=list(found.nodes))
        return found.nodes

    def tell_network(self) -> None:
        """Take the settings that follow from the nodes of the attempt, and tell what is new about them and their network."""
        names = self.life.nodes if self.life else ()
        before, self.settings = told_settings(self.settings), self.network.settings(names)
        text = told_settings(self.settings)
        if text != before and not all(self.nodes[name].address.startswith("127.") for name in names):
            self.scribe.tell("settings", f"NCCL and gloo: {text}")
        warning = self.network.tensor_warning(len(names))
        if warning and warning != self._warned:
            self.scribe.tell("tensor parallelism", warning)
        self._warned = warning

    def enter(self, transition: Transition) -> None:
        """Come into the state to which it leads."""
        if self.state != transition.to:
            self._since_s = time.monotonic()
        self.record.state, self.record.reason = transition.to, transition.reason

    def begin(self, life: Life) -> None:
        """Another attempt begins."""
        self.record.generation, self.life = self.generation + 1, life
        self.nodes.last_step = 0
        self.store = None

    def tell(self, message: ToAgent) -> None:
        """Send this to the nodes of the attempt."""
        for name in self.life.nodes if self.life else ():
            self.nodes[name].send(message)

    def note_size(self) -> None:
        """Every change begins the time anew that nodes must have been there: so a flapping one costs no attempt."""
        size = size_of_attempt(self.view())
        if size != self._size:
            self._size, self._size_since_s = size, time.monotonic()

    def view(self) -> JobView:
        """What the machine decides upon."""
        return JobView(
            state=self.state,
            since_s=self._since_s,
            now_s=time.monotonic(),
            nodes=self.nodes.states(),
            nodes_needed=self.config.nodes,
            join_timeout_s=self.config.join_timeout_s,
            max_restarts=self.config.restarts,
            history=tuple(self.record.history),
            attempt=self.life.view() if self.life else None,
            stop=self.record.stop,
            requeue_on_term=self.config.requeue_on_term or self.config.on == "slurm",
            refusal=self.roster.refusal,
            shortage=" ".join(filter(None, (self.roster.shortage(), self.nodes.refused))),
            fewer_nodes=self.fewer_nodes,
            shrink_after_s=self.config.shrink_after_s,
            grow_after_s=self.config.grow_after_s,
            size_since_s=self._size_since_s,
            aside=self.aside,
            suspected=self.suspected,
            leaving=frozenset(self.record.drained),
        )


def _topology(config: JobConfig) -> Topology | None:
    """That of the job file. It could be read at launch; a controller on another node may not see it, and goes on without."""
    try:
        return read_topology(config.topology) if config.topology is not None else None
    except LayoutRequestInvalid as error:
        print(f"nodes are ordered by what agents tell: {error}", flush=True)
        return None
