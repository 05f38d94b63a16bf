"""The controller of a job: listens to agents and people, asks the machine what follows, and carries it out.

Everything happens in one asyncio loop. Whatever is decided is in the journal before it is done, so that a controller
that was killed goes on where it was; the workers do not need it between two decisions.
"""

import asyncio
import signal
import time
from collections.abc import Sequence
from typing import Any

from pydantic import JsonValue

from evermesh.fault.snapshot.choosing import Version
from evermesh.launcher.config import HangConfig, JobConfig
from evermesh.launcher.contact import keeper_secret, read_token
from evermesh.launcher.controller.guests import Guests
from evermesh.launcher.controller.in_memory import complete_step, job_groups, newest_of, remembered_step
from evermesh.launcher.controller.journal import Journal
from evermesh.launcher.controller.life import Life
from evermesh.launcher.controller.machine import JobView, Stop, Transition, choose_nodes, decide, size_of_attempt
from evermesh.launcher.controller.nodes import Node
from evermesh.launcher.controller.racks import lost_rack, place_nodes
from evermesh.launcher.controller.reach import Reach
from evermesh.launcher.controller.record import replay
from evermesh.launcher.controller.rescue import Rescue
from evermesh.launcher.controller.roster import Roster
from evermesh.launcher.controller.scribe import Scribe
from evermesh.launcher.controller.stacks import stacks_of, told_stacks
from evermesh.launcher.controller.status import ENDED, JobState, Standing
from evermesh.launcher.controller.stripes import Stripes
from evermesh.launcher.controller.telling import explain, going_on, told_stop
from evermesh.launcher.controller.work import (
    drop_unfinished_line,
    last_step,
    launch_of,
    newest_step,
    report_of,
    training_work,
)
from evermesh.launcher.elastic import node_counts
from evermesh.launcher.errors import NotReplicated
from evermesh.launcher.freezes import frozen
from evermesh.launcher.messages import (
    Ask,
    Beat,
    CannotStart,
    ChangeLayout,
    End,
    FromAgent,
    Hello,
    KeeperTells,
    Leave,
    Noticed,
    OpenStore,
    Outcome,
    PlanReport,
    Preempted,
    Progress,
    Report,
    Start,
    Started,
    Store,
    StoreOpened,
    ToAgent,
    Welcome,
    WriteStacks,
)
from evermesh.launcher.placement import Placement
from evermesh.launcher.policy import REQUEUE, Failure, root_cause
from evermesh.launcher.run_directory import Run
from evermesh.launcher.succession.office import Office
from evermesh.runtime.telemetry import StepReport

_TICK_S = 0.1
_WRITE_AGAIN_S = 0.5
_GRACE_S = 3.0
"""Agents may be in the middle of asking a controller that was stopped; that takes 2 s."""
_WRITE_WAIT_S = 10.0
"""How long nobody may make room on a full disk before the job is ended."""

_NO_SNAPSHOT_STEPS = 100
"""An attempt in another layout makes its first snapshot behind its first step. Where none is complete by then there is no
room for one, and guests only take what there is."""


class Controller:
    """The controller of ``run``; ``serve`` may be called once. ``office`` is its term; None: nobody could take over."""

    def __init__(
        self, run: Run, config: JobConfig, journal: Journal, placement: Placement, office: Office | None = None
    ) -> None:
        self.run, self.config, self._office = run, config, office
        self._scribe = Scribe(run, journal, config.workers)
        names = [f"node-{number}" for number in range(config.nodes + config.spares)]
        self._roster = Roster(run, names, placement, self._scribe)
        self.nodes = self._roster.nodes
        self._rescue = Rescue(run, self.nodes, self._scribe)
        self._fewer_nodes = node_counts(config)[1:]
        self._changed = asyncio.Event()
        self.last_report: StepReport | None = None
        self.reported_s = time.monotonic()
        """When that came."""
        self.plan: dict[str, Any] | None = None
        self._store: Store | None = None
        is_revived = run.state().state == "running"
        if not is_revived:
            generation = journal.entries[-1].generation if journal.entries else run.state().attempt
            journal.append(generation, "launch", f"{config.workers} workers, {config.nodes} nodes", on=config.on)
        self.record = replay(journal.entries)
        self._began_s, self._failed_before = time.monotonic(), len(self.record.history)
        """What this controller has seen fail, and in which time: of an earlier one only a clock on the wall could tell."""
        self._scribe.generation = self.record.generation
        if office is not None and office.term != self.record.term:
            self._scribe.note("term", office.reason, term=office.term, node=office.node)
            self.record.term = office.term
        self.life = Life.from_record(self.record, config)
        self._reach: Reach | None = None
        """Of the memory of all nodes, while the job waits for nodes and may go on with fewer."""
        self._guests: Guests | None = None
        self._stripes: Stripes | None = None
        self._since_s = time.monotonic()
        self._size: int | None = None
        """Nodes that an attempt could have now, and since when."""
        self._size_since_s = time.monotonic()
        self._roster.find(self.record.pids if is_revived else {}, 0.0 if office is None else _GRACE_S)

    # what happens

    def greet(self, node_name: str, hello: Hello, outbox: "asyncio.Queue[str]") -> Node:
        """An agent has connected."""
        if self._office is not None:
            self._office.meet(hello.seat)
        if self.record.pids.get(node_name) != hello.pid:
            self._scribe.note("node", f"agent {hello.pid} on {hello.host}", node=node_name, pid=hello.pid)
            self.record.pids[node_name] = hello.pid
        node = self.nodes[node_name]
        was_cut_off, before = node.state == "cut off" and node.host != "", node.outbox
        is_new = self.nodes.greet(hello)
        if is_new and before is not None:
            node.send(Leave())  # to the agent that is still there: one of a node is enough
        node.outbox = outbox
        if self._office is not None:
            node.send(Welcome(term=self._office.term))
        node.in_memory = None
        node.remember(hello.in_memory)
        if self.life and is_new and node_name in self.life.nodes:
            self.life.lost.add(node_name)  # what ran under the agent before died with it
        elif was_cut_off:
            self._scribe.tell("node back", f"{node_name} is heard again", node=node_name)
        if hello.outcome is not None:
            self._take_outcome(node, hello.outcome)
        self._repeat_orders(node, hello)
        if self._stripes is not None:
            self._stripes.greet(node)
        elif self._guests is not None:
            self._guests.greet(node)
        self._changed.set()
        return node

    def receive(self, node: Node, message: FromAgent) -> None:
        """An agent says something."""
        node.hear()
        match message:
            case Beat():
                self._take_beat(node, message)
                return
            case StoreOpened() if message.generation == self.generation:
                self._store = message.store
                self._start_ranks()
            case Started() if message.generation == self.generation and self.life:
                self.life.pids |= message.pids
                if message.fresh_because:
                    self._scribe.tell(
                        "fresh interpreters", f"workers of {node.name} were not forked: {message.fresh_because}"
                    )
            case Report() if message.generation == self.generation:
                self.last_report, self.reported_s = report_of(message.values), time.monotonic()
                if self.life:  # it may fail before the next beat tells of the step
                    self.life.has_reported = True
                self._end_guests(self.last_report)
            case PlanReport() if message.generation == self.generation:
                self.plan = message.values
            case Progress():
                node.remember(message.in_memory)
                self._take_outcome(node, message.outcome)
            case Preempted():
                self.stop(message.signal, at_once=False, grace_s=self.config.grace_s)
            case Noticed():
                self._scribe.tell(message.event, f"{node.name}: {message.text}", node=node.name)
            case KeeperTells() if message.generation == self.generation:
                self._hear_of_keeper(node, message)
            case CannotStart() if message.generation == self.generation:
                self._roster.refusal = message.text
        self._changed.set()

    def part(self, node: Node, outbox: "asyncio.Queue[str]") -> None:
        """The connection to an agent is gone."""
        if node.outbox is outbox:
            node.outbox = None
        self._changed.set()

    def stop(self, number: int, *, at_once: bool, grace_s: float | None) -> None:
        """Somebody wants the job to end; the second time it is at once."""
        before, now_s = self.record.stop, time.monotonic()
        if before is not None:  # the first one decides the exit code, and no later one gives more time
            number, at_once = before.signal, at_once or before.at_once
            left_s = None if before.deadline_s is None else max(0.0, before.deadline_s - now_s)
            grace_s = min((limit_s for limit_s in (left_s, grace_s) if limit_s is not None), default=None)
        self._scribe.note("stop", told_stop(number, at_once), signal=number, at_once=at_once, grace_s=grace_s)
        self.record.stop = Stop(signal.Signals(number), at_once, None if grace_s is None else now_s + grace_s)
        self._changed.set()

    def save(self) -> None:
        """Have a checkpoint written after the current step."""
        self._scribe.note("save", "asked for a checkpoint")
        self._tell(Ask(generation=self.generation, what="save"))

    def change_layout(self, changes: dict[str, JsonValue]) -> None:
        """Have the ranks go on with these changes to their layout; the event log tells what became of it."""
        told = ", ".join(f"{name} {value}" for name, value in changes.items())
        self._scribe.note("relayout", f"asked for another layout: {told}", changes=changes)
        self._tell(ChangeLayout(generation=self.generation, changes=changes))

    def write_stacks(self) -> None:
        """Have every rank write down what it is doing."""
        self._tell(WriteStacks(because="asked for"))

    # the loop

    @property
    def state(self) -> JobState:
        return self.record.state

    @property
    def generation(self) -> int:
        return self.record.generation

    @property
    def protection(self) -> Standing:
        """Of the newest snapshot, by the memory of other nodes."""
        return self._stripes.protection if self._stripes is not None else "none"

    @property
    def lost_rack(self) -> str | None:
        """What the loss of one rack would cost; None if that is survived, or nothing is known of racks."""
        if self.life is None or not self.config.racks:
            return None
        groups = job_groups(self.config, len(self.life.nodes))
        return lost_rack(self.life.nodes, self.nodes.racks(self.config.racks), groups)

    async def serve(self) -> int:
        """Run the job to its end; returns the exit code. Agents and workers are gone then."""
        self._take_over()
        written_s = time.monotonic()
        while self.state not in ENDED:
            if not (self.run.directory / "state.json").is_file():  # who writes events makes the directory again
                return await self._give_up()
            self._changed.clear()
            try:
                self._advance()
                written_s = time.monotonic()
            except OSError as error:  # the journal or the state cannot be written: what was not done is tried again
                self._scribe.make_room()
                self._roster.restart_ended(error)
                wait_s = self.config.join_timeout_s if isinstance(error, NotReplicated) else _WRITE_WAIT_S
                if time.monotonic() - written_s > wait_s:
                    self._end_unwritten(error)
                await asyncio.sleep(_WRITE_AGAIN_S)
            if self.state not in ENDED:
                await self._sleep()
        await self._roster.dismiss()
        return self.record.exit_code or 0

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
            requeue_on_term=self.config.requeue_on_term,
            refusal=self._roster.refusal,
            shortage=self._roster.shortage(),
            fewer_nodes=self._fewer_nodes,
            shrink_after_s=self.config.shrink_after_s,
            grow_after_s=self.config.grow_after_s,
            size_since_s=self._size_since_s,
        )

    def _end_unwritten(self, error: OSError) -> None:
        """End the job without an entry in the journal."""
        text = (
            f"what the controller does can no longer be written down in {self.run.directory}: {error}. Make room there."
        )
        code = 1
        if isinstance(error, NotReplicated) and self._office is not None:
            self._office.check_nobody_else(self.run.directory)
            text, code = f"{error} They did not within {self.config.join_timeout_s:g} s (join_timeout_s).", REQUEUE
        print(text, flush=True)
        self._scribe.end("failed", code, text, None)
        self.record.state, self.record.exit_code = "failed", code

    def _take_over(self) -> None:
        """Say that this process controls the job; end it where an earlier one decided that, and was killed."""
        if self.state in ENDED:
            self._end_job(Transition(self.state, self.record.reason, self.record.exit_code))
        else:
            self._scribe.begin()

    def _advance(self) -> None:
        """Do what follows from all that is known by now."""
        if self._office is not None and not self._office.attend(list(self.nodes)):
            return
        self._roster.judge(self.life, self.state)
        self._look_for_frozen()
        if self._roster.is_finding_out():
            return
        self._count_attempt()
        self._look_at_memory()
        self._prepare_memory()
        if self._stripes is not None and self.life is not None and not self.life.is_ending:
            self._stripes.look()
            if not self.life.is_started:
                self._start_ranks()
        self._note_size()
        while (transition := decide(self.view())) is not None:
            if self._is_in_memory_alone(transition) and self._is_rescuing():
                return
            if transition.to == "starting" and self._is_looking():
                return
            self._carry_out(transition)

    def _note_size(self) -> None:
        """Every change begins the time anew that nodes must have been there: so a flapping one costs no attempt."""
        size = size_of_attempt(self.view())
        if size != self._size:
            self._size, self._size_since_s = size, time.monotonic()

    def _is_in_memory_alone(self, transition: Transition) -> bool:
        """Whether the job would end without what attempts have left in memory, for no rank is there who could save it."""
        return transition.to == "failed" or (transition.to == "stopped" and self._is_between_attempts)

    @property
    def _is_between_attempts(self) -> bool:
        return self.life is not None and (self.life.view().has_regrouped or not self.life.is_started)

    def _is_looking(self) -> bool:
        """Whether it is not known yet what fewer nodes than before would find in memory."""
        is_smaller = size_of_attempt(self.view()) != self.config.nodes
        return is_smaller and self._reach is not None and not self._reach.is_known

    def _is_rescuing(self) -> bool:
        """Whether what is in memory alone is being written to storage: the job ends after that."""
        stop = self.record.stop
        is_over = stop is not None and stop.deadline_s is not None and time.monotonic() > stop.deadline_s
        if stop is not None and (stop.at_once or is_over or not self._is_between_attempts):
            self._rescue.give_up()
        return self._rescue.is_under_way(self.record.started_s)

    async def _sleep(self) -> None:
        try:
            await asyncio.wait_for(self._changed.wait(), _TICK_S)
        except TimeoutError:
            return

    # what is done

    def _carry_out(self, transition: Transition) -> None:
        before = self.state
        self._scribe.note(
            "transition",
            transition.reason,
            **{"from": before, "to": transition.to, "ends_ranks": transition.ends_ranks},
            exit_code=transition.exit_code,
        )
        if transition.ends_ranks:
            self._end_ranks(transition.reason)
        elif transition.to == "starting":
            self._begin_attempt(transition.reason)
        elif transition.to == "stopping":
            self._tell(Ask(generation=self.generation, what="stop"))
        elif transition.to == "regrouping":
            self._scribe.tell("regrouping", transition.reason)
            self._tell(Ask(generation=self.generation, what="regroup"))
        elif transition.to in ENDED:
            self._end_job(transition)
        self.record.state, self.record.reason = transition.to, transition.reason
        if before != transition.to:
            self._since_s = time.monotonic()

    def _begin_attempt(self, reason: str) -> None:
        before = self.life.nodes if self.life else ()
        nodes = choose_nodes(self.nodes.states(), size_of_attempt(self.view()) or self.config.nodes, before)
        assert nodes is not None, "the machine starts no attempt without nodes"
        nodes = self._spread(nodes, before)
        self._scribe.generation = self.generation + 1
        guests = self._guests_of(nodes)
        remembered = remembered_step(self.nodes, nodes, self.config, self.record.started_s)
        remembered = newest_of(guests.step, remembered)
        life = Life(nodes, self.config, newest_of(newest_step(self.run), remembered))
        life.remembered = remembered
        self._rescue.give_up()  # ranks go on from memory, and write to it
        self._rescue = Rescue(self.run, self.nodes, self._scribe)
        self._scribe.note("attempt", reason, nodes=list(nodes), began_at=life.began_at)
        self._scribe.begin()
        told = self.lost_rack
        self.record.generation, self.life = self.generation + 1, life  # from here on nothing can be refused
        if self.lost_rack not in (None, told):
            self._scribe.tell("rack unprotected", str(self.lost_rack))
        drop_unfinished_line(self.run.telemetry)
        self.nodes.last_step = 0
        self._store, self._reach, self._guests, self._stripes = None, None, guests, None
        guests.begin()
        self._prepare_memory()
        self.nodes[nodes[0]].send(OpenStore(generation=self.generation))

    def _spread(self, chosen: tuple[str, ...], before: tuple[str, ...]) -> tuple[str, ...]:
        """The nodes of the next attempt by place, apart as far as they can be."""
        ready = [name for name, state in self.nodes.states().items() if state == "ready"]
        racks, groups = self.nodes.racks(self.config.racks), job_groups(self.config, len(chosen))
        return place_nodes(chosen, before, ready, racks, groups)

    def _look_at_memory(self) -> None:
        keepers, launch = self.nodes.keepers, launch_of(self.record.started_s)
        if self.state == "waiting" and self._fewer_nodes and self._reach is None and keepers:
            self._reach = Reach(keepers, launch, keeper_secret(read_token(self.run.directory), launch))

    def _guests_of(self, chosen: Sequence[str]) -> Guests:
        saved, reached = newest_step(self.run) or 0, self._reach.newest if self._reach is not None else None

        def is_worth(version: Version) -> bool:
            return version.step >= saved and (reached is None or version > reached)

        return Guests(self.nodes, chosen, self.config, self._scribe, self.record.started_s, is_worth)

    def _prepare_memory(self) -> None:
        """Once guests have what was lost with nodes that nobody replaces, keepers take the places of the attempt."""
        life = self.life
        if life is None or life.is_ending or self._stripes is not None:
            return
        if self._guests is None:  # an earlier controller began it, and may have been killed before that was done
            self._guests = self._guests_of(life.nodes)
            if not life.is_started and not life.has_stepped:
                self._guests.begin()
        self._guests.look()
        if not self._guests.is_under_way:
            launch = launch_of(self.record.started_s)
            self._stripes = Stripes(self.nodes, life, self.config, self._scribe, launch, newest_step(self.run))
            self._stripes.begin()

    def _end_guests(self, report: StepReport) -> None:
        """What they keep is not needed once there is a complete snapshot of this attempt, or if there will be none."""
        restored = (self.life.remembered if self.life else None) or 0
        if report.snapshot.committed or report.step > restored + _NO_SNAPSHOT_STEPS:
            self.nodes.end_guests(list(self.nodes.guests))

    def _hear_of_keeper(self, node: Node, told: KeeperTells) -> None:
        if self._stripes is None and self._guests is not None:
            self._guests.hear(node, told)
        elif self._stripes is not None and told.guest is None:
            self._stripes.hear(node, told)

    def _start_ranks(self) -> None:
        """As soon as there is a store, and all is in memory that can be had there."""
        store, stripes = self._store, self._stripes
        if self.life is None or self.state != "starting" or store is None or stripes is None or not stripes.are_ready:
            return
        if not self.life.is_started:
            anywhere = complete_step(self.nodes, self.config, self.record.started_s)
            self.life.is_started, self.life.remembered = True, newest_of(stripes.remembered(), anywhere)
            if stripes.has_failed or (self._guests is not None and self._guests.has_failed):
                self.life.began_at = newest_of(newest_step(self.run), self.life.remembered)
        work = training_work(
            self.run, self.config, self.record.started_s, self.life.world_size, self.life.remembered, self.nodes.keepers
        )
        seen = {
            "failures": len(self.record.history) - self._failed_before,
            "running_s": time.monotonic() - self._began_s,
        }
        work = work.model_copy(update={"arguments": work.arguments | seen})
        for number, name in enumerate(self.life.nodes):
            place = self.life.place(number)
            start = Start(generation=self.generation, place=place, store=store, work=work, hang=self._hang)
            self.nodes[name].send(start)

    def _end_ranks(self, reason: str) -> None:
        assert self.life is not None
        self.life.is_ending = True
        self._tell(End(generation=self.generation, stacks_because=None if self.record.stop else reason))
        for name in self.life.lost:
            self._roster.replace(name)
        if self.life.failures or self.life.lost:
            self._scribe.tell("failed", explain(self.run, self.life, reason), attempt=self.generation)

    @property
    def _hang(self) -> HangConfig | None:
        """What nodes without a controller go by; None where a rank that waits for a GPU looks idle."""
        return self.config.hang if self.config.train.device.kind == "cpu" else None

    def _look_for_frozen(self) -> None:
        """A rank that is stopped or hangs has failed, though nobody says so."""
        life, config = self.life, self.config.hang
        if life is None or config is None or self.state not in ("starting", "training", "regrouping", "stopping"):
            return
        if life.done or life.failures or life.is_ending:
            return
        sees_work = self.config.train.device.kind == "cpu"
        found = frozen(life.beats.values(), life.world_size, config, sees_work=sees_work)
        if found is not None:
            life.fail(Failure(rank=found.rank, time_s=time.monotonic(), how=found.how, cause="froze"))

    def _count_attempt(self) -> None:
        """Add a failed attempt to the history once its ranks are gone: until then it may still save."""
        life = self.life
        if life is None or self.state != "recovering" or life.is_counted:
            return
        states, gone = self.nodes.states(), life.over | life.lost
        if any(node not in gone and states[node] == "ready" for node in life.nodes):
            return
        remembered = remembered_step(self.nodes, life.nodes, self.config, self.record.started_s)
        newest = newest_of(newest_step(self.run), remembered)
        progressed = (newest or 0) > (life.began_at or 0)
        failed = life.failed(self.record.reason, progressed=progressed)
        self._scribe.note("attempt failed", self.record.reason, **failed.model_dump(mode="json"))
        self.record.history.append(failed)
        life.is_counted = True
        decision = decide(self.view())
        if decision is not None and decision.to in ("starting", "waiting"):
            is_in_memory = remembered is not None and remembered == newest
            told = explain(self.run, life, self.record.reason)
            text = going_on(told, newest, decision.reason, is_in_memory=is_in_memory)
            lost_steps = max(0, last_step(self.run) - (newest or 0))
            source = "memory" if is_in_memory else "storage"
            self._scribe.tell("restarted", text, step=newest or 0, source=source, lost_steps=lost_steps)
        if root_cause(failed.failures).cause == "froze":
            doing = stacks_of(self.run, self.generation, life.world_size)
            frames: JsonValue = {str(rank): list(one.frames) for rank, one in doing.items()}
            waiting: JsonValue = [rank for rank, one in doing.items() if one.waits]
            self._scribe.tell("stacks", told_stacks(doing), doing=frames, waiting=waiting)

    def _end_job(self, transition: Transition) -> None:
        drop_unfinished_line(self.run.telemetry)
        error = traceback = None
        if transition.to == "failed":
            error, traceback = self._last_words(transition.reason)
        elif "at once" in transition.reason:
            error = transition.reason
        self._scribe.end(transition.to, transition.exit_code, error, traceback)  # type: ignore[arg-type]
        self.record.exit_code = transition.exit_code

    def _last_words(self, reason: str) -> tuple[str, str | None]:
        if self.life is None or not self.record.history:
            return reason, None
        if self.state == "waiting":  # no attempt was wrong: nodes are missing
            first = root_cause(self.record.history[-1].failures)
            return f"rank {first.rank} {first.how.splitlines()[0]}. {reason}", None
        text = explain(self.run, self.life, self.record.reason)
        if len(self.record.history) > 1 or self.config.restarts:
            text += f"\nNo other attempt: {reason}."
        first = root_cause(self.record.history[-1].failures)
        return text, first.text if first.has_traceback and not first.peer_lost else None

    async def _give_up(self) -> int:
        """Somebody has removed the run: nothing of it can be kept any more."""
        print(f"{self.run.directory} is gone: ending the job", flush=True)
        await self._roster.dismiss()
        return 1

    def _repeat_orders(self, node: Node, hello: Hello) -> None:
        """Say again what an agent may have missed while there was no connection."""
        life, told = self.life, hello.outcome
        if self.state in ENDED:
            node.send(Leave())
        if told is not None and not told.is_over and told.generation != self.generation:
            node.send(End(generation=told.generation))  # it was cut off while the others went on without it
        if life is None or node.name not in life.nodes:
            return
        has_ranks = hello.outcome is not None and hello.outcome.generation == self.generation
        if self.state == "starting" and not has_ranks:
            self.nodes[life.nodes[0]].send(OpenStore(generation=self.generation))
        elif life.is_ending:
            node.send(End(generation=self.generation))
        elif self.state == "stopping":
            node.send(Ask(generation=self.generation, what="stop"))
        elif self.state == "regrouping":
            node.send(Ask(generation=self.generation, what="regroup"))

    def _take_outcome(self, node: Node, outcome: Outcome) -> None:
        life = self.life
        if life is None or outcome.generation != self.generation or node.name not in life.nodes:
            return
        life.take(node.name, outcome)

    def _take_beat(self, node: Node, beat: Beat) -> None:
        node.memory_free_bytes, node.snapshot_bytes = beat.memory_free_bytes, beat.snapshot_bytes
        node.keeper = beat.keeper or node.keeper
        if node.state == "cut off":
            node.state = "ready"
            self._scribe.tell("node back", f"{node.name} is heard again", node=node.name)
        if self.life is None or beat.generation != self.generation:
            return
        for rank in beat.ranks:
            self.life.beats[rank.rank] = rank
            self.nodes.note_step(rank.step)
        if self.state == "starting" and self.life.has_stepped:
            self._changed.set()

    def _tell(self, message: ToAgent) -> None:
        for name in self.life.nodes if self.life else ():
            self.nodes[name].send(message)
