"""The agent of one node: owns the workers there, tells the controller about them, does what it is told.

It has one thread (and the link's). Its workers die with it; without a controller they train on.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from pydantic import ValidationError

from evermesh.fault.cluster.identity import identity_of
from evermesh.fault.hardware.looking import look_at_hardware, with_gpus
from evermesh.launcher.agent import warm
from evermesh.launcher.agent.candidate import Candidate
from evermesh.launcher.agent.guests import Guests
from evermesh.launcher.agent.health import NodeHealth
from evermesh.launcher.agent.keeping import KEEPER_LOST, NodeKeeper
from evermesh.launcher.agent.link import Link, LinkHooks
from evermesh.launcher.agent.loop import Loop
from evermesh.launcher.agent.numbers import NodeNumbers
from evermesh.launcher.agent.pulse import Pulse
from evermesh.launcher.agent.recording import Recording
from evermesh.launcher.agent.revival import Revival
from evermesh.launcher.agent.shared_memory import POINTS, Board, SharedArea
from evermesh.launcher.agent.spec import AgentSpec
from evermesh.launcher.agent.standby import Standbys
from evermesh.launcher.agent.store import StoreProcess
from evermesh.launcher.agent.striping import NodeStripe
from evermesh.launcher.agent.watching import Watching
from evermesh.launcher.agent.worker_group import Hooks, WorkerGroup
from evermesh.launcher.config import HangConfig
from evermesh.launcher.contact import read_contact
from evermesh.launcher.errors import LauncherError
from evermesh.launcher.freezes import left_alone
from evermesh.launcher.messages import (
    Ask,
    Beat,
    CannotStart,
    ChangeLayout,
    End,
    EndGuest,
    HealthTold,
    Hello,
    HostGuest,
    JoinStripe,
    Keep,
    Leave,
    LeaveStripe,
    Noticed,
    OpenStore,
    Outcome,
    PlanReport,
    Preempted,
    Progress,
    RankBeat,
    Rebuild,
    Report,
    Speeds,
    Start,
    Started,
    StoreOpened,
    ToAgent,
    ToAgentAdapter,
    Welcome,
    WriteStacks,
)
from evermesh.launcher.succession.office import START_S
from evermesh.launcher.watching.messages import PlannedWork, ReadRings

_BEAT_S = 0.25
_LEAVE_WAIT_S = 5.0
_SOON_S = 0.01


class Agent:
    """The agent of one node. ``run`` may be called once, from the main thread."""

    def __init__(self, spec: AgentSpec, token: str) -> None:
        self.spec = spec
        self._loop = Loop()
        self._area = SharedArea(f"{spec.run.resolve().name}-{os.getpid()}-{spec.node}", spec.slots)
        self._board = Board(self._area.board)
        self._group: WorkerGroup | None = None
        self._pulses: dict[int, Pulse] = {}
        """By local rank of the group."""
        self._hang: HangConfig | None = None
        self._standbys = Standbys()
        self._store: StoreProcess | None = None
        self._keeper = NodeKeeper(spec.run, spec.node, spec.address, token)
        self._sockets = _socket_settings(spec.address)
        self._hardware = look_at_hardware(spec.labels)
        self._recording = Recording(spec.run, spec.node)
        self._health = NodeHealth(
            self._loop, spec, lambda verdicts: self._link.send(HealthTold(verdicts=tuple(verdicts)))
        )
        self._has_left = False
        self._preempted: int | None = None
        self._candidate = self._make_candidate(token)
        later_s = START_S if self._candidate else 0.0  # leave others time to be elected
        self._revival = Revival(spec.run, spec.node, later_s) if spec.revives else None
        hooks = LinkHooks(self._greet, self._receive, self._note_lost)
        find = self._candidate.find if self._candidate else lambda: read_contact(spec.run, spec.node)
        self._link = Link(self._loop, spec.node, token, find, hooks)
        self._numbers = NodeNumbers(spec, token, self._missing_s)
        self._stripe = NodeStripe(self._loop, self._keeper, spec.address, token, self._link.send)
        self._guests = Guests(self._loop, self._keeper, spec.address, token, self._link.send)
        self._watching = Watching(lambda message: self._loop.post(lambda: self._link.send(message)))

    def run(self) -> None:
        """Serve until told to leave. No process of it is left."""
        with _signals(self._preempt):
            try:
                if self._candidate:
                    self._candidate.begin()
                self._health.begin()  # beside the warm process
                warm.warm_up(self.spec.warm_module, self.spec.threads)
                self._health.finish_first()
                self._beat()
                self._loop.run_until(lambda: self._has_left)
            finally:
                self._leave()

    def _make_candidate(self, token: str) -> Candidate | None:
        if self.spec.journal_folder is None:
            return None
        try:
            return Candidate(self.spec, token, self._missing_s)
        except OSError as error:
            print(f"no copy of the journal is kept here, and this node never takes over: {error}", flush=True)
            return None

    def _greet(self) -> None:
        if self._candidate:
            self._candidate.note_heard(None)  # until it has said its term
        outcome = self._group.outcome if self._group else None
        self._link.send(
            Hello(
                node=self.spec.node,
                host=socket.gethostname(),
                address=self.spec.address,
                pid=os.getpid(),
                outcome=outcome,
                shared_memory_bytes=self._area.num_bytes,
                in_memory=self._keeper.in_memory(),
                guests=self._guests.in_memory(),
                seat=self._candidate.seat if self._candidate else None,
                is_head=self.spec.is_head,
                metrics=self._numbers.at,
                verdicts=self._health.verdicts,
                identity=identity_of(self.spec.node, self.spec.address),
                hardware=with_gpus(self._hardware, self._health.gpus),
            )
        )
        if self._group and not self._group.outcome.is_over:
            self._tell_started(self._group)
            self._watching.greet()
        if self._preempted is not None:
            self._link.send(Preempted(signal=signal.Signals(self._preempted)))

    def _receive(self, text: str | bytes) -> None:
        try:
            message = ToAgentAdapter.validate_json(text)
        except ValidationError as error:  # a controller of another version: the workers go on
            print(f"not understood: {error}", flush=True)
            return
        if self._candidate and isinstance(message, Welcome):
            self._candidate.note_heard(message.term)
        if self._is_stale(message) or not self._obeys():
            return
        match message:
            case Keep():
                self._stripe.keep(message)
            case HostGuest():
                self._guests.host(message, self.spec.run)
            case EndGuest():
                self._guests.end(message.guest)
            case JoinStripe() if stripe := self._stripe_of(message.guest):
                stripe.join(message)
            case LeaveStripe():
                self._stripe.leave()
            case Rebuild() if stripe := self._stripe_of(message.guest):
                stripe.rebuild(message)
            case OpenStore():
                self._try(message.generation, lambda: self._open_store(message.generation))
            case Start():
                self._try(message.generation, lambda: self._start(message))
            case Ask() if self._group:
                self._group.ask(message.what)
            case ChangeLayout() if self._group:
                self._group.change_layout(message.changes)
            case Speeds() if self._group:
                self._group.change_speeds(message.speeds)
            case End():
                self._end(message)
            case WriteStacks() if self._group:
                self._group.write_stacks(message.because)
                self._recording.keep()
            case ReadRings():
                self._watching.read(message)
            case Leave():
                self._has_left = True

    def _stripe_of(self, guest: str | None) -> NodeStripe | None:
        return self._stripe if guest is None else self._guests.stripe(guest)

    def _is_stale(self, message: ToAgent) -> bool:
        """Whether it is about an older generation than the one that runs here: its sender missed something."""
        return self._group is not None and getattr(message, "generation", sys.maxsize) < self._group.generation

    def _obeys(self) -> bool:
        """Whether who is at the other end of the link is the controller; else the link is given up."""
        if self._candidate is None:
            return True
        term = self._candidate.term_heard
        if term is not None and self._candidate.obeys(term):
            return True
        print(f"the controller of term {term} is not obeyed any more", flush=True)
        self._link.drop()
        return False

    def _try(self, generation: int, action: Any) -> None:
        try:
            action()
        except (LauncherError, OSError) as error:
            self._link.send(CannotStart(generation=generation, text=f"{self.spec.node}: {error}"))

    def _open_store(self, generation: int) -> None:
        if self._store is None or not self._store.is_alive:
            self._store = StoreProcess(self.spec.address)
        self._link.send(StoreOpened(generation=generation, store=self._store.address))

    def _start(self, message: Start) -> None:
        if self._group:
            if self._group.generation == message.generation:
                return  # said twice, by a controller that was restarted in between
            self._group.kill()  # there are never two trainers of one rank
            self._group.wait_gone()
        if not self._area.board.is_file():
            self._area.make()
            self._board.close()
            self._board = Board(self._area.board)
        hooks = Hooks(self._tell_progress, self._pass_report, self._pass_plan, self._pass_work)
        logs = Path(message.work.logs)
        group = WorkerGroup(self._loop, message.generation, message.place, logs, hooks, self._standbys)
        self._group = group
        self._pulses = {local_rank: Pulse() for local_rank in range(message.place.ranks)}
        self._hang = message.hang
        keeper = self._keeper.keep_for(message.work.launch)
        keepers = self._keeper.others(message.work.launch, message.work.keepers)
        rings = self._recording.begin(wanted=message.work.records)
        settings = self._sockets | message.settings
        group.start(message.store, message.work, self._area.board, settings, keeper, keepers, rings)
        self._watching.begin(message.generation, group.rings, message.place.world_size)
        self._tell_started(group)

    def _fill_standbys(self, beats: Sequence[RankBeat]) -> None:
        """Have as many workers in waiting as ranks may have to be started here at once; none are forked while ranks load
        their state."""
        group = self._group
        if (
            group is None
            or group.outcome.is_over
            or (len(beats) == group.place.ranks and all(beat.step for beat in beats))
        ):
            self._standbys.fill(self.spec.slots)

    def _end(self, message: End) -> None:
        if self._group and self._group.generation == message.generation:
            self._group.end(message.stacks_because)
        else:  # it never started here
            if self._group:
                self._group.end()
            self._link.send(Progress(outcome=Outcome(generation=message.generation, is_over=True)))

    def _tell_started(self, group: WorkerGroup) -> None:
        self._link.send(Started(generation=group.generation, pids=group.pids, fresh_because=group.fresh_because))

    def _tell_progress(self) -> None:
        if self._group:
            outcome = self._group.outcome
            in_memory = self._keeper.in_memory() if outcome.is_over else None
            self._link.send(Progress(outcome=outcome, in_memory=in_memory))
            if outcome.is_over:
                self._watching.end()
                self._recording.keep()  # while the controller thinks; the next start finds it done

    def _pass_report(self, values: dict[str, Any]) -> None:
        if self._group:
            self._link.send(Report(generation=self._group.generation, values=values))

    def _pass_plan(self, values: dict[str, Any]) -> None:
        if self._group:
            self._link.send(PlanReport(generation=self._group.generation, values=values))

    def _pass_work(self, values: dict[str, Any]) -> None:
        if self._group:
            self._link.send(PlannedWork(generation=self._group.generation, **values))

    def _beat(self) -> None:
        generation, beats = self._group.generation if self._group else 0, tuple(self._rank_beats())
        snapshot_bytes = self._keeper.num_bytes + self._guests.num_bytes
        self._numbers.tell(beats, snapshot_bytes)
        self._link.send(
            Beat(
                generation=generation,
                ranks=beats,
                memory_free_bytes=psutil.virtual_memory().available,
                shared_memory_free_bytes=self._area.free_bytes,
                snapshot_bytes=snapshot_bytes,
                keeper=self._keeper.address,
            )
        )
        self._loop.after(_BEAT_S, self._beat)
        noticed = self._keeper.look()
        for kind, text in (*noticed, *self._guests.look()):
            print(f"{kind}: {text}", flush=True)
            self._link.send(Noticed(event=kind, text=text))
        self._stripe.look(had_died=any(kind == KEEPER_LOST for kind, _ in noticed))
        self._health.look()
        self._look_after_controller()
        self._fence(beats)
        self._fill_standbys(beats)

    def _fence(self, beats: Sequence[RankBeat]) -> None:
        """End ranks that wait while no controller is in reach: for ranks from which this node is cut off, and others may
        have taken their places. What they have left in memory stays."""
        missing_s, group = self._missing_s(), self._group
        if self._hang is None or group is None or missing_s is None or group.outcome.is_over:
            return
        found = left_alone(beats, self._hang, missing_s) if len(beats) == group.place.ranks else None
        if found is not None:
            print(
                f"ending the ranks: rank {found.rank} {found.how}, and no controller for {missing_s:.1f} s", flush=True
            )
            group.give_up(found.rank, f"{found.how}; its node was out of reach for {missing_s:.1f} s")

    def _rank_beats(self) -> Iterator[RankBeat]:
        if self._group is None:
            return
        place = self._group.place
        for local_rank in range(place.ranks):
            pulse = self._pulses[local_rank]
            slot = self._board.read(local_rank) or pulse.slot  # it may have been stopped while it wrote
            if slot is not None and slot.generation == self._group.generation:
                pulse.look(slot, time.monotonic())
                yield RankBeat(
                    rank=place.first_rank + local_rank,
                    pid=slot.pid,
                    step=slot.step,
                    step_s=slot.step_s,
                    compute_s=slot.compute_s,
                    longest_s=slot.longest_s,
                    point=POINTS[slot.point],
                    idle_s=pulse.idle_s,
                    stopped_s=pulse.stopped_s,
                )

    def _missing_s(self) -> float | None:
        """Seconds without a controller; None while there is one. Any thread may ask."""
        lost_s = self._link.lost_since_s
        return None if lost_s is None else time.monotonic() - lost_s

    def _look_after_controller(self) -> None:
        missing_s = self._missing_s()
        if missing_s is None:
            if self._candidate and self._candidate.term_heard is not None:
                self._obeys()  # another may have been elected by those who do not hear this one
            return
        if self._candidate and self._candidate.is_starting:
            return
        is_head = self._candidate is not None and self._candidate.is_head
        if self._revival and self._revival.consider(missing_s, is_head=is_head) and self._candidate:
            self._candidate.note_revival()
        is_idle = self._group is None or self._group.outcome.is_over
        if is_idle and missing_s > self.spec.orphan_limit_s:
            print(f"no controller for {missing_s:.0f} s and nothing to run: leaving", flush=True)
            self._has_left = True

    def _note_lost(self) -> None:
        if self._candidate:
            self._candidate.note_heard(None)
        print("the controller is not there any more; the workers go on", flush=True)
        if self._revival:
            self._loop.after(self._revival.patience_s + _SOON_S, self._look_after_controller)  # not with the beat after

    def _preempt(self, number: int, frame: FrameType | None) -> None:
        """A signal says that this node goes away: let the whole job save and stop; a second one ends this agent."""
        if self._preempted not in (None, signal.SIGUSR1):
            self._has_left = True
        self._preempted = number
        self._loop.post(lambda: self._link.send(Preempted(signal=signal.Signals(number))))

    def _leave(self) -> None:
        self._link.close()
        if self._candidate:
            self._candidate.close(job_is_over=self._has_left)
        if self._group:
            self._group.kill()
            self._group.wait_gone()
        self._standbys.close()
        self._health.close()
        self._keeper.leave(job_is_over=self._has_left)
        self._guests.leave(job_is_over=self._has_left)
        if self._store:
            self._store.close()
        self._watching.close()
        self._recording.close()
        self._numbers.close()
        self._board.close()
        self._area.close()
        self._loop.close()


def _socket_settings(address: str) -> dict[str, str]:
    """The network interface that has ``address``, for gloo and NCCL; none where there is none of that name."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            return {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return {}


@contextmanager
def _signals(preempt: Any) -> Iterator[None]:
    """SIGTERM means preemption, and SIGUSR1 that it is near; Ctrl-C belongs to whoever shows the job."""
    before = {number: signal.signal(number, preempt) for number in (signal.SIGTERM, signal.SIGUSR1)}
    before |= {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
