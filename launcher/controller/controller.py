"""The controller of a job: listens to agents and people, asks the machine what follows, and carries it out.

Everything happens in one asyncio loop. Whatever is decided is in the journal before it is done, so that a controller
that was killed goes on where it was; the workers do not need it between two decisions.
"""

import asyncio
import signal
import time
from typing import cast

from pydantic import JsonValue

from evermesh.launcher.config import HangConfig, JobConfig
from evermesh.launcher.controller import trackers
from evermesh.launcher.controller.aftermath import count_failed
from evermesh.launcher.controller.attempt_memory import AttemptMemory
from evermesh.launcher.controller.health import Health
from evermesh.launcher.controller.in_memory import newest_of
from evermesh.launcher.controller.isolation import Isolation
from evermesh.launcher.controller.job import Job
from evermesh.launcher.controller.journal import Journal
from evermesh.launcher.controller.layout_choice import LayoutChoice
from evermesh.launcher.controller.life import Life
from evermesh.launcher.controller.machine import Stop, Transition, choose_nodes, decide, size_of_attempt
from evermesh.launcher.controller.nodes import Node
from evermesh.launcher.controller.repeating import repeated_orders
from evermesh.launcher.controller.rescue import Rescue
from evermesh.launcher.controller.scribe import Kept
from evermesh.launcher.controller.status import ENDED, JobState, Standing
from evermesh.launcher.controller.telling import explain, last_words, told_stop
from evermesh.launcher.controller.watching import Watch
from evermesh.launcher.controller.work import drop_unfinished_line, newest_step, report_of, training_work
from evermesh.launcher.errors import NotReplicated
from evermesh.launcher.freezes import frozen
from evermesh.launcher.messages import (
    Ask,
    Beat,
    CannotStart,
    ChangeLayout,
    End,
    FromAgent,
    HealthTold,
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
    StoreOpened,
    Welcome,
    WriteStacks,
)
from evermesh.launcher.placement import Placement
from evermesh.launcher.policy import REQUEUE, Failure
from evermesh.launcher.run_directory import Run
from evermesh.launcher.succession.office import Office
from evermesh.launcher.watching.messages import Connections, PlannedWork, RingPart, Window

_TICK_S = 0.1
_WRITE_AGAIN_S = 0.5
_WRITE_WAIT_S = 10.0
"""How long nobody may make room on a full disk before the job is ended."""


class Controller:
    """The controller of ``run``; ``serve`` may be called once. ``office`` is its term; None: nobody could take over."""

    def __init__(
        self, run: Run, config: JobConfig, journal: Journal, placement: Placement, office: Office | None = None
    ) -> None:
        self.job = Job(run, config, journal, placement, office)
        self.run, self.config, self._office = run, config, office
        self.nodes, self.record, self._scribe = self.job.nodes, self.job.record, self.job.scribe
        self._roster, self._memory = self.job.roster, AttemptMemory(self.job)
        self._rescue, self._layouts = Rescue(self.job), LayoutChoice(self.job)
        self.watch = Watch(self.job)
        self.health = Health(self.job)
        self.isolation = Isolation(self.job)
        self.health.listeners.append(self.isolation.on_verdicts)
        self._changed = asyncio.Event()

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
        self.health.take(node, hello.verdicts)
        saved = newest_step(self.run) if self.life and self.life.saving_behind is not None else None
        for name, order in repeated_orders(self.state, self.generation, self.life, hello, saved):
            self.nodes[name].send(order)
        (self._rescue if self._rescue.is_rebuilding else self._memory).greet(node)
        self._changed.set()
        return node

    def receive(self, node: Node, message: FromAgent) -> None:
        """An agent says something."""
        node.hear()
        match message:
            case Beat():
                self._take_beat(node, message)
                return
            case Window() | RingPart() | PlannedWork() | Connections():
                self.watch.take(node.name, message)
                return
            case StoreOpened() if message.generation == self.generation:
                self.job.store = message.store
                self._start_ranks()
            case Started() if message.generation == self.generation and self.life:
                self.life.pids |= message.pids
                if message.fresh_because:
                    self._scribe.tell(
                        "fresh interpreters", f"workers of {node.name} were not forked: {message.fresh_because}"
                    )
            case Report() if message.generation == self.generation:
                self.job.last_report, self.job.reported_s = report_of(message.values), time.monotonic()
                if self.life:  # it may fail before the next beat tells of the step
                    self.life.has_reported = True
                self._memory.end_guests(self.job.last_report)
                self.watch.note_step(self.job.last_report)
            case PlanReport() if message.generation == self.generation:
                self.job.plan = message.values
            case Progress():
                node.remember(message.in_memory)
                self._take_outcome(node, message.outcome)
            case Preempted():
                is_early = message.signal == signal.SIGUSR1  # Slurm, before its time limit
                self.stop(signal.SIGTERM, at_once=False, grace_s=None if is_early else self.config.grace_s)
            case Noticed():
                self._scribe.tell(message.event, f"{node.name}: {message.text}", node=node.name)
                self.isolation.on_noticed(node.name, message.event, message.text)
            case HealthTold():
                self.health.take(node, message.verdicts)
            case KeeperTells() if message.generation == self.generation:
                (self._rescue if self._rescue.is_rebuilding else self._memory).hear(node, message)
            case CannotStart() if message.generation == self.generation:
                self._roster.refusal = message.text
        self._changed.set()

    def pass_on(self, node: Node, text: str) -> None:
        """An agent says something that only the watcher understands, see ``is_for_watcher``."""
        node.hear()
        self.watch.pass_on(node.name, text)

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
        if self.life is not None:
            self.life.saving_behind = self.job.last_report.step if self.job.last_report else 0
        self.job.tell(Ask(generation=self.generation, what="save"))

    def change_layout(self, changes: dict[str, JsonValue]) -> None:
        """Have the ranks go on with these changes to their layout; the event log tells what became of it."""
        told = ", ".join(f"{name} {value}" for name, value in changes.items())
        self._scribe.note("relayout", f"asked for another layout: {told}", changes=changes)
        self.job.tell(ChangeLayout(generation=self.generation, changes=changes))

    def drain(self, node: str, by: str, because: str) -> str:
        """Have the job go on without a node; returns what it calls that. Raises ``DrainRefused`` if it cannot."""
        self._changed.set()
        return self.isolation.drain(node, by, because)

    def write_stacks(self) -> None:
        """Have every rank write down what it is doing."""
        self.job.tell(WriteStacks(because="asked for"))

    # the loop

    @property
    def state(self) -> JobState:
        return self.job.state

    @property
    def generation(self) -> int:
        return self.job.generation

    @property
    def life(self) -> Life | None:
        return self.job.life

    @property
    def protection(self) -> Standing:
        """Of the newest snapshot, by the memory of other nodes."""
        return self._memory.protection

    async def serve(self) -> int:
        """Run the job to its end; returns the exit code. Agents and workers are gone then."""
        self._take_over()
        trackers.begin(self.run, self.config)
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
        await asyncio.to_thread(self.isolation.close)
        self.watch.close()
        await self._roster.dismiss()
        await trackers.end(self.run, self.config)
        return self.record.exit_code or 0

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
        self.watch.look()
        self._look_for_frozen()
        if self._roster.is_finding_out():
            return
        count_failed(self.job)
        self.isolation.on_findings(self.watch.findings)  # one that lasts is evidence again
        self.isolation.look()
        self._memory.look()
        if self.life is not None and not self.life.is_ending and not self.life.is_started:
            self._start_ranks()
        self.job.note_size()
        while (transition := decide(self.job.view())) is not None:
            if self._is_in_memory_alone(transition) and self._is_rescuing():
                return
            if transition.to == "starting" and (self._memory.is_looking or self.isolation.is_looking):
                return
            self._carry_out(transition)
        self._layouts.look()

    def _is_in_memory_alone(self, transition: Transition) -> bool:
        """Whether the job would end without what attempts have left in memory, for no rank is there who could save it."""
        return transition.to == "failed" or (transition.to == "stopped" and self.job.is_between_attempts)

    def _is_rescuing(self) -> bool:
        """Whether what is in memory alone is being rebuilt, or written to storage: the job ends after that."""
        stop = self.record.stop
        is_over = stop is not None and stop.deadline_s is not None and time.monotonic() > stop.deadline_s
        if stop is not None and (stop.at_once or is_over or not self.job.is_between_attempts):
            self._rescue.give_up()
        return self._rescue.is_under_way()

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
            self.job.tell(Ask(generation=self.generation, what="stop"))
        elif transition.to == "regrouping":
            self._scribe.tell("regrouping", transition.reason)
            self.job.tell(Ask(generation=self.generation, what="regroup"))
        elif transition.to in ENDED:
            self._end_job(transition)
        self.job.enter(transition)

    def _begin_attempt(self, reason: str) -> None:
        before = self.life.nodes if self.life else ()
        view = self.job.view()
        nodes = choose_nodes(view.spares_first, size_of_attempt(view) or self.config.nodes, before)
        assert nodes is not None, "the machine starts no attempt without nodes"
        nodes = self.job.in_order(nodes)
        self._scribe.generation = self.generation + 1
        guests = self._memory.guests_for(nodes)
        remembered = self._memory.step_for(nodes, guests)
        life = Life(nodes, self.config, newest_of(newest_step(self.run), remembered))
        life.remembered = remembered
        self._rescue.give_up()  # ranks go on from memory, and write to it
        self._rescue = Rescue(self.job)
        self._scribe.note("attempt", reason, nodes=list(nodes), began_at=life.began_at)
        self._scribe.begin()
        told = self.job.lost_rack
        self.job.begin(life)  # from here on nothing can be refused
        self.job.tell_network()
        if self.job.lost_rack not in (None, told):
            self._scribe.tell("rack unprotected", str(self.job.lost_rack))
        drop_unfinished_line(self.run.telemetry)
        self._memory.begin(guests)
        self.nodes[nodes[0]].send(OpenStore(generation=self.generation))

    def _start_ranks(self) -> None:
        """As soon as there is a store, and all is in memory that can be had there."""
        life, store = self.life, self.job.store
        if life is None or self.state != "starting" or store is None or not self._memory.is_ready:
            return
        if not life.is_started:
            life.is_started, life.remembered = True, self._memory.step
            if self._memory.has_failed:
                life.began_at = newest_of(newest_step(self.run), life.remembered)
        life.layout = life.layout or self._layouts.of(life)
        started_s, keepers = self.record.started_s, self.nodes.keepers
        work = training_work(self.run, self.config, started_s, life.layout, keepers, life.ranks_of)
        work = work.model_copy(update={"arguments": work.arguments | self.job.seen})
        for number, name in enumerate(life.nodes):
            place = life.place(number)
            settings = {one.name: one.value for one in self.job.settings.get(name, ())}
            start = Start(
                generation=self.generation, place=place, store=store, work=work, hang=self._hang, settings=settings
            )
            self.nodes[name].send(start)

    def _end_ranks(self, reason: str) -> None:
        assert self.life is not None
        self.life.is_ending = True
        self.job.tell(End(generation=self.generation, stacks_because=None if self.record.stop else reason))
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
        found = frozen(life.beats.values(), life.world_size, config, self.watch.findings, sees_work=sees_work)
        if found is not None:
            for rank in (found.rank, *found.others):
                life.fail(Failure(rank=rank, time_s=time.monotonic(), how=found.how, cause="froze"))

    def _end_job(self, transition: Transition) -> None:
        drop_unfinished_line(self.run.telemetry)
        error = traceback = None
        if transition.to == "failed":
            error, traceback = last_words(self.run, self.config, self.record, self.life, transition.reason)
            error = "\n".join(filter(None, (error, self._rescue.why_not)))
        elif "at once" in transition.reason:
            error = transition.reason
        self._scribe.end(cast(Kept, transition.to), transition.exit_code, error, traceback)
        self.record.exit_code = transition.exit_code

    async def _give_up(self) -> int:
        """Somebody has removed the run: nothing of it can be kept any more."""
        print(f"{self.run.directory} is gone: ending the job", flush=True)
        await self._roster.dismiss()
        return 1

    def _take_outcome(self, node: Node, outcome: Outcome) -> None:
        life = self.life
        if life is None or outcome.generation != self.generation or node.name not in life.nodes:
            return
        life.take(node.name, outcome)

    def _take_beat(self, node: Node, beat: Beat) -> None:
        node.take(beat)
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
