"""Jobs with one fault each, or with what only looks like one, and what is to be found; drawn from a seed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from evermesh.fault.detectors import Context, kinds
from evermesh.fault.events import Finding
from tests.fault.suite.faults import Fault, is_long
from tests.fault.suite.programs import Job

SIZES = (2, 4, 8)
_DIMS = {
    2: ((2, 1, 1), (1, 2, 1), (1, 1, 2)),
    4: ((4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2)),
    8: ((8, 1, 1), (4, 2, 1), (2, 2, 2), (4, 1, 2)),
}
"""dp, tp, pp."""
_MOST_STEPS = 4096


@dataclass(frozen=True, slots=True)
class Expected:
    """What is to be found."""

    kinds: frozenset[str]
    """Of which one is right; empty: nothing may be found."""
    rank: int | None = None
    link: tuple[int, int] | None = None
    node: str | None = None
    says: str = ""
    """What the sentence has to say too."""
    note: str = ""
    """What has to be said of the rank among what is no fault."""

    def is_right(self, finding: Finding, job: Job) -> bool:
        """Whether a finding says what is the matter, and names who it is, and nobody else."""
        if finding.kind not in self.kinds or self.says not in finding.text:
            return False
        if self.link is not None:
            return finding.link == self.link
        return finding.rank == self.rank and (self.node is None or finding.node == self.node)


@dataclass(frozen=True, slots=True)
class Case:
    """One job."""

    kind: str
    seed: int
    job: Job
    expected: Expected
    fault: Fault | None = None
    context: Context = field(default_factory=Context)
    watched_s: float = 10.0
    """No longer, counted from the moment at which it happens."""
    burners: int = 0
    """Processes beside the job that take processors."""
    is_on_hosts: bool = False
    """Every rank in a network namespace of its own."""

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.job.world_size} ranks, seed {self.seed}"


Draw = Callable[[np.random.Generator, int], Case]


def draw(kind: str, world_size: int, seed: int) -> Case:
    """A case of a kind of FAULTS or INNOCENTS."""
    random = np.random.default_rng([seed, world_size, sum(kind.encode())])
    case = {**FAULTS, **INNOCENTS}[kind](random, world_size)
    return replace(case, kind=kind, seed=seed)


def _job(random: np.random.Generator, size: int, *, alike: bool = False, flavours: str = "runtime script") -> Job:
    """``alike``: no pipeline without ranks that do the same."""
    dims = [one for one in _DIMS[size] if not alike or one[0] * one[1] > 1]
    dp, tp, pp = dims[int(random.integers(len(dims)))]
    flavour = str(random.choice(flavours.split()))
    compute_s = float(random.uniform(0.003, 0.008))
    return Job(dp, tp, pp, flavour, compute_s=compute_s, micro_batches=int(random.integers(1, 4)))  # type: ignore[arg-type]


def _fault(kind: str, random: np.random.Generator, job: Job, amount: float = 1.0) -> Fault:
    first = 30 if job.flavour == "bare" else 6  # nobody can tell a first step from others where no step is told
    step = int(random.integers(first, 2 * first))
    return Fault(kind, int(random.integers(job.world_size)), step, float(random.random()), amount)


def _stuck(kind: str, says: str = "", flavours: str = "runtime script bare") -> Draw:
    def make(random: np.random.Generator, size: int) -> Case:
        job = _job(random, size, flavours=flavours)
        fault = _fault(kind, random, job)
        return Case(kind, 0, job, Expected(frozenset({kinds.HANG}), fault.rank, says=says), fault)

    return make


def _checkpoint(random: np.random.Generator, size: int) -> Case:
    job = _job(random, size, flavours="runtime")
    fault = _fault("checkpoint", random, job)
    return Case("checkpoint", 0, job, Expected(frozenset(), fault.rank, note="checkpoint"), fault, watched_s=4.0)


def _wrong(kind: str, *found: str, may_be_plain: bool = False) -> Draw:
    def make(random: np.random.Generator, size: int) -> Case:
        job = _job(random, size, alike=True)
        if may_be_plain and random.random() < 0.5:
            job = replace(job, is_plain=True, dp=size, tp=1, pp=1)
        fault = _fault(kind, random, job)
        return Case(kind, 0, job, Expected(frozenset(found), fault.rank), fault)

    return make


def _slow(kind: str, least: float, most: float) -> Draw:
    def make(random: np.random.Generator, size: int) -> Case:
        job = _job(random, size, alike=True)
        fault = _fault(kind, random, job, float(random.uniform(least, most)))
        if random.random() < 0.5:
            fault = replace(fault, step=1)
        return Case(
            kind,
            0,
            job,
            Expected(frozenset({kinds.SLOW_RANK}), fault.rank),
            fault,
            watched_s=30.0,
        )

    return make


def _clock(random: np.random.Generator, size: int) -> Case:
    job = replace(_job(random, size), ranks_per_node=max(1, size // 2))
    jump_s = float(random.choice([-1, 1]) * random.uniform(0.5, 3600))
    fault = _fault("clock jump", random, job, jump_s)
    expected = Expected(frozenset({kinds.CLOCK_JUMP}), node=job.node(fault.rank))
    return Case("clock jump", 0, job, expected, fault)


def _way(kind: str, *found: str) -> Draw:
    """A fault of the way between two ranks that are in a group with each other."""

    def make(random: np.random.Generator, size: int) -> Case:
        job = replace(_job(random, size, flavours="runtime script"), ranks_per_node=1)
        fault = _fault(kind, random, job, float(random.uniform(2e6, 6e6)))
        axis = str(random.choice([axis for axis, ranks in job.groups() if fault.rank in ranks]))
        ring = job.group_of(fault.rank, axis)
        peer = ring[(ring.index(fault.rank) + 1) % len(ring)]
        link = (min(fault.rank, peer), max(fault.rank, peer))
        fault = replace(fault, peer=peer)
        return Case(kind, 0, job, Expected(frozenset(found), link=link), fault, watched_s=20.0, is_on_hosts=True)

    return make


def _healthy(random: np.random.Generator, size: int) -> Case:
    return Case("healthy", 0, _job(random, size, flavours="runtime script bare"), Expected(frozenset()), watched_s=8.0)


def _long_sequence(random: np.random.Generator, size: int) -> Case:
    job = _job(random, size, alike=True)
    fault = replace(_fault("long sequence", random, job, float(random.uniform(2.0, 3.0))), step=1)
    work = {
        (rank, step): fault.amount if rank == fault.rank and is_long(fault, step) else 1.0
        for rank in range(size)
        for step in range(1, _MOST_STEPS)
    }
    return Case("", 0, job, Expected(frozenset()), fault, Context(work_s=work), watched_s=6.0)


def _unbalanced(random: np.random.Generator, size: int) -> Case:
    dims = [one for one in _DIMS[size] if one[2] > 1]
    dp, tp, pp = dims[int(random.integers(len(dims)))]
    job = replace(_job(random, size), dp=dp, tp=tp, pp=pp)
    fault = replace(_fault("unbalanced stage", random, job, 1.8), step=1)
    return Case("", 0, job, Expected(frozenset()), fault, watched_s=6.0)


def _evaluation(random: np.random.Generator, size: int) -> Case:
    job = _job(random, size, flavours="runtime")
    return Case("", 0, job, Expected(frozenset()), _fault("evaluation", random, job, 1.5), watched_s=8.0)


def _noise(random: np.random.Generator, size: int) -> Case:
    return Case("", 0, _job(random, size), Expected(frozenset()), watched_s=8.0, burners=int(random.integers(2, 5)))


_GONE, _ORDER = "its process does not run", (kinds.DEADLOCK, kinds.SKIPPED)
FAULTS: Mapping[str, Draw] = {
    "SIGKILL": _stuck("SIGKILL", _GONE),
    "SIGSTOP": _stuck("SIGSTOP", "its process is stopped"),
    "early exit": _stuck("early exit", _GONE),
    "exception": _stuck("exception", _GONE),
    "GIL held in C": _stuck("GIL held in C"),
    "endless loop": _stuck("endless loop"),
    "data loader": _stuck("data loader", "waits for input", "runtime"),
    "checkpoint": _checkpoint,
    "skipped": _wrong("skipped", *_ORDER, may_be_plain=True),
    "extra": _wrong("extra", kinds.EXTRA, kinds.DEADLOCK, may_be_plain=True),
    "other operation": _wrong("other operation", kinds.MISMATCH),
    "other shape": _wrong("other shape", kinds.SIZE_MISMATCH),
    "other dtype": _wrong("other dtype", kinds.DTYPE_MISMATCH),
    "other order": _wrong("other order", kinds.DEADLOCK, kinds.REORDERED),
    "slow rank": _slow("slow rank", 1.5, 2.5),
    "pauses": _slow("pauses", 0.15, 0.35),
    "slow link": _way("slow link", kinds.SLOW_LINK),
    "one-way loss": _way("one-way loss", kinds.COMMUNICATION_HANG),
    "clock jump": _clock,
}
TOO_FEW: Mapping[str, int] = {"slow link": 2}
"""Kinds that need more ranks: two have one way, and nothing to compare it with."""
INNOCENTS: Mapping[str, Draw] = {
    "healthy": _healthy,
    "long sequence": _long_sequence,
    "unbalanced stage": _unbalanced,
    "evaluation": _evaluation,
    "noisy processors": _noise,
}
