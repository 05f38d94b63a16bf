"""A rank of a job of the suite: a process that computes and communicates, step by step, until it is killed."""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from evermesh.fault.recorder import in_scripts
from evermesh.fault.recorder.recorder import Recorder
from evermesh.fault.recorder.ring import RingSpec
from evermesh.parallelism.collectives import Moment
from tests.fault.suite import faults
from tests.fault.suite.programs import Action, Job, program

_MODEL = 64


@dataclass(frozen=True, slots=True)
class RankSpec:
    """What a rank is told."""

    job: Job
    rank: int
    folder: Path
    """In shared memory: rings, rendezvous, what was injected."""
    fault: faults.Fault | None = None
    timeout_s: float = 600.0
    """Of torch."""
    is_recorded: bool = True
    is_detail: bool = False
    """With torch's own checks of every collective."""
    namespace: str = ""
    """Of the network, by name; its ``eth0`` is used."""

    @property
    def ring(self) -> RingSpec:
        job = self.job
        path = self.folder / f"0-{self.rank}.ring"
        return RingSpec(path, self.rank, job.world_size, 0, job.node(self.rank), str(self.folder))


def run_rank(spec: RankSpec) -> None:
    """Join the job and train until somebody ends this process; what fails ends it with a line of stderr."""
    with (spec.folder / f"{spec.rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        _Rank(spec).train()
    except BaseException as error:  # noqa: BLE001  as a script would end, without waiting for threads of torch
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


class _Rank:
    def __init__(self, spec: RankSpec) -> None:
        torch.set_num_threads(1)
        self.spec, self.moment = spec, Moment()
        self.is_told = spec.job.flavour == "runtime"
        """Whether records say step and phase."""
        if spec.namespace:
            _enter(spec.namespace)
        if spec.is_recorded:
            self._record()
        if spec.is_detail:
            dist.set_debug_level(dist.DebugLevel.DETAIL)
        store = dist.FileStore(str(spec.folder / "rendezvous"), spec.job.world_size)
        dist.init_process_group(
            "gloo",
            store=store,
            rank=spec.rank,
            world_size=spec.job.world_size,
            timeout=timedelta(seconds=spec.timeout_s),
        )
        self.groups: dict[str, Any] = {"world": dist.group.WORLD}
        for axis, ranks in spec.job.groups():
            timeout = timedelta(seconds=spec.timeout_s)
            group = dist.new_group(list(ranks), timeout, group_desc=axis if self.is_told else None)
            if spec.rank in ranks:
                self.groups[axis] = group
        self.model = torch.nn.Linear(_MODEL, _MODEL)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.batch = torch.randn(16, _MODEL)
        (spec.folder / f"{spec.rank}.ready").touch()

    def _record(self) -> None:
        ring = self.spec.ring
        if self.is_told:
            self.recorder = Recorder(ring)
            self.recorder.follow(self.moment)
            return
        os.environ.update(in_scripts.environment_of(ring, {}), RANK=str(self.spec.rank))
        in_scripts.arm()

    def train(self) -> None:
        job, fault, step = self.spec.job, self.spec.fault, 0
        is_mine = fault is not None and fault.rank == self.spec.rank
        while True:
            step += 1
            self.moment.begin_step(step)
            actions = program(job, self.spec.rank, step)
            if fault is not None:
                actions = _innocent(fault, job, self.spec.rank, actions)
            for action in fault.apply(job, actions, step) if fault is not None and is_mine else actions:
                self._do(action)
            self._behind(step)

    def _behind(self, step: int) -> None:
        """What is done behind a step."""
        fault = self.spec.fault
        if fault is None:
            return
        if fault.kind in ("checkpoint", "clock jump") and step == fault.step and fault.rank == self.spec.rank:
            if fault.kind == "checkpoint":
                self.moment.phase = "checkpoint"
            self._fault()
        if fault.kind == "evaluation" and step % 5 == 0:
            self.moment.phase = "evaluate"
            time.sleep(fault.amount if fault.rank == self.spec.rank else 0.01)
            self._collective(Action("collective", "world", "all_reduce", 4))

    def _do(self, action: Action) -> None:
        _ACTS[action.what](self, action)

    def _load(self, action: Action) -> None:
        self.moment.phase = "data"
        time.sleep(action.seconds)
        self.moment.phase = "train"

    def _compute(self, action: Action) -> None:
        loss = self.model(self.batch).square().mean()
        loss.backward()
        time.sleep(action.seconds)

    def _collective(self, action: Action) -> None:
        group = self.groups[action.axis]
        tensor = torch.ones(action.elements, dtype=getattr(torch, action.dtype))
        if action.operation == "all_reduce":
            dist.all_reduce(tensor, group=group)
        elif action.operation == "all_gather":
            dist.all_gather([torch.empty_like(tensor) for _ in range(group.size())], tensor, group=group)
        else:
            dist.broadcast(tensor, group=group, group_src=0)

    def _send(self, action: Action) -> None:
        dist.send(torch.ones(action.elements), action.peer, group=self.groups["pp"])

    def _receive(self, action: Action) -> None:
        dist.recv(torch.empty(action.elements), action.peer, group=self.groups["pp"])

    def _optimize(self, action: Action) -> None:
        if self.spec.job.flavour == "bare":
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(1e-3 * parameter.grad)
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _fault(self, action: Action | None = None) -> None:
        fault = self.spec.fault
        assert fault is not None
        if fault.kind == "data loader":
            self.moment.phase = "data"
        faults.note(self.spec.folder, fault)
        act = faults.HANGS.get(fault.kind)
        if act is not None:
            act()


_ACTS: dict[str, Callable[[_Rank, Action], None]] = {
    "load": _Rank._load,
    "compute": _Rank._compute,
    "collective": _Rank._collective,
    "send": _Rank._send,
    "receive": _Rank._receive,
    "optimize": _Rank._optimize,
    "fault": _Rank._fault,
}


def _innocent(fault: faults.Fault, job: Job, rank: int, actions: list[Action]) -> list[Action]:
    """What all ranks, or all of a stage, do otherwise than usual."""
    if fault.kind == "unbalanced stage" and job.place(rank)[0] == job.place(fault.rank)[0]:
        return [one._replace(seconds=one.seconds * fault.amount) if one.what == "compute" else one for one in actions]
    return actions


def _enter(namespace: str) -> None:
    """Be in a network namespace from now on."""
    import ctypes

    descriptor = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(descriptor)
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"


def burn(seconds: float) -> None:
    """Take the time of a processor: noise for everybody."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        sum(range(10_000))
