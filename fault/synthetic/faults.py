"""What goes wrong in a synthetic job, and what only looks so: changes of its program, before it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evermesh.fault.recorder.record import DTYPES, OPERATIONS, PHASES
from evermesh.fault.synthetic.program import Program, make_record
from evermesh.parallelism.collectives import Phase


class Fault(Protocol):
    """A change of a program."""

    def apply(self, program: Program, random: np.random.Generator) -> None: ...


def _train_rows(program: Program, rank: int, from_step: int = 0) -> np.ndarray:
    """Rows of ``rank`` in the phase ``train``."""
    rows = program.rows(rank)
    own = program.records[rows]
    chosen = (own["phase"] == PHASES.index("train")) & (own["step"] >= from_step)
    return rows.start + np.flatnonzero(chosen)


@dataclass(frozen=True, slots=True)
class Hang:
    """A rank never enters a record: a loop, a stop, a death, a loader that gives nothing."""

    rank: int
    step: int
    axis: str = "world"
    phase: Phase | None = None
    """Where it says it is; by default where the record is."""
    nth: int = -1

    def apply(self, program: Program, random: np.random.Generator) -> None:
        index = program.find(self.rank, self.step, self.axis, nth=self.nth)
        program.work_s[int(program.starts[self.rank]) + index] = np.inf
        if self.phase is not None:
            program.phases[self.rank] = self.phase


@dataclass(frozen=True, slots=True)
class CommunicationHang:
    """All ranks of a group enter a collective and none leaves it."""

    rank: int
    """One of the group."""
    step: int
    axis: str = "dp"

    def apply(self, program: Program, random: np.random.Generator) -> None:
        index = program.find(self.rank, self.step, self.axis)
        record = program.records[int(program.starts[self.rank]) + index]
        group = program.shape.group_of[self.rank, int(record["group"])]
        program.frozen.add((int(group), int(record["number"])))


@dataclass(frozen=True, slots=True)
class Skip:
    """A rank leaves out a collective."""

    rank: int
    step: int
    axis: str = "dp"

    def apply(self, program: Program, random: np.random.Generator) -> None:
        program.remove(self.rank, program.find(self.rank, self.step, self.axis))


@dataclass(frozen=True, slots=True)
class Extra:
    """A rank does a collective twice."""

    rank: int
    step: int
    axis: str = "dp"

    def apply(self, program: Program, random: np.random.Generator) -> None:
        index = program.find(self.rank, self.step, self.axis)
        record = program.records[int(program.starts[self.rank]) + index].copy()
        program.insert(self.rank, index + 1, record)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A rank does another operation, or with other bytes or another dtype."""

    rank: int
    step: int
    axis: str = "dp"
    operation: str | None = None
    num_bytes: int | None = None
    dtype: str | None = None

    def apply(self, program: Program, random: np.random.Generator) -> None:
        row = int(program.starts[self.rank]) + program.find(self.rank, self.step, self.axis)
        if self.operation is not None:
            program.records["operation"][row] = OPERATIONS.index(self.operation)
        if self.num_bytes is not None:
            program.records["num_bytes"][row] = self.num_bytes
        if self.dtype is not None:
            program.records["dtype"][row] = DTYPES.index(self.dtype)


@dataclass(frozen=True, slots=True)
class Swap:
    """A rank does two neighbouring collectives of different groups in the other order."""

    rank: int
    step: int
    first: str = "dp"
    nth: int = 0

    def apply(self, program: Program, random: np.random.Generator) -> None:
        index = program.find(self.rank, self.step, self.first, nth=self.nth)
        own = program.records[program.rows(self.rank)]
        own[[index, index + 1]] = own[[index + 1, index]]
        program.renumber(self.rank)


@dataclass(frozen=True, slots=True)
class SlowRank:
    """A rank computes ``factor`` times as long, more with every step by ``growth``."""

    rank: int
    factor: float = 1.0
    from_step: int = 0
    growth: float = 0.0

    def apply(self, program: Program, random: np.random.Generator) -> None:
        rows = _train_rows(program, self.rank, self.from_step)
        steps = program.records["step"][rows].astype(np.int64)
        program.work_s[rows] *= (self.factor + self.growth * (steps - steps[0])).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Pauses:
    """A rank pauses for ``seconds`` in some steps, as in a garbage collection."""

    rank: int
    seconds: float
    every: int = 4

    def apply(self, program: Program, random: np.random.Generator) -> None:
        shape = program.shape
        for step in range(shape.first_step + 1, shape.first_step + shape.steps, self.every):
            rows = _train_rows(program, self.rank)
            rows = rows[program.records["step"][rows] == step]
            program.work_s[random.choice(rows)] += self.seconds


@dataclass(frozen=True, slots=True)
class SlowInput:
    """The loader of a rank takes ``seconds`` longer in every step."""

    rank: int
    seconds: float

    def apply(self, program: Program, random: np.random.Generator) -> None:
        rows = program.rows(self.rank)
        chosen = program.records["phase"][rows] == PHASES.index("data")
        program.work_s[rows][chosen] += self.seconds


@dataclass(frozen=True, slots=True)
class SlowTransfer:
    """What some ranks send, or receive, takes longer where it leaves the node; or what passes one link."""

    factor: float
    senders: Sequence[int] = ()
    receivers: Sequence[int] = ()
    link: tuple[int, int] | None = None
    from_step: int = 0

    def apply(self, program: Program, random: np.random.Generator) -> None:
        program.send_factor[list(self.senders)] = self.factor
        program.receive_factor[list(self.receivers)] = self.factor
        if self.link is not None:
            program.link_factor[self.link] = self.factor
        program.slow_from_step = self.from_step


@dataclass(frozen=True, slots=True)
class SlowJob:
    """All ranks compute ``factor`` times as long from a step on."""

    factor: float
    from_step: int

    def apply(self, program: Program, random: np.random.Generator) -> None:
        chosen = program.records["step"] >= self.from_step
        program.work_s[chosen] *= np.float32(self.factor)


@dataclass(frozen=True, slots=True)
class LongSequence:
    """Innocent: a rank has a sequence that takes ``factor`` times as long, in one step."""

    rank: int
    step: int
    factor: float = 3.0

    def apply(self, program: Program, random: np.random.Generator) -> None:
        rows = _train_rows(program, self.rank)
        program.work_s[rows[program.records["step"][rows] == self.step]] *= np.float32(self.factor)


@dataclass(frozen=True, slots=True)
class UnevenSequences:
    """Innocent: lengths of sequences have a long tail, so in every step another rank has most work."""

    sigma: float = 0.4

    def apply(self, program: Program, random: np.random.Generator) -> None:
        shape = program.shape
        factors = np.exp(self.sigma * random.standard_normal((shape.dp, shape.steps))).astype(np.float32)
        for rank in range(shape.num_ranks):
            rows = _train_rows(program, rank)
            steps = program.records["step"][rows].astype(np.int64) - shape.first_step
            program.work_s[rows] *= factors[rank // shape.tp % shape.dp, steps]


@dataclass(frozen=True, slots=True)
class UnbalancedStage:
    """Innocent: one pipeline stage has more layers than the others."""

    stage: int
    factor: float = 1.6

    def apply(self, program: Program, random: np.random.Generator) -> None:
        for rank in range(program.shape.num_ranks):
            if program.shape.stage_of(rank) == self.stage:
                program.work_s[_train_rows(program, rank)] *= np.float32(self.factor)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Innocent: before a step all ranks evaluate or write a checkpoint, some longer than others."""

    step: int
    seconds: float
    phase: Phase = "evaluate"
    slowest: int = 0

    def apply(self, program: Program, random: np.random.Generator) -> None:
        site = "evaluation" if self.phase == "evaluate" else "checkpoint"
        for rank in range(program.shape.num_ranks):
            own = program.records[program.rows(rank)]
            index = int(np.flatnonzero(own["step"] == self.step)[0])
            record = np.array([make_record("world", "all_reduce", 64, "float64", site, self.phase)], own.dtype)[0]
            record["step"] = self.step
            took_s = self.seconds * (2 if rank == self.slowest else random.uniform(0.8, 1.2))
            program.insert(rank, index, record, took_s)


@dataclass(frozen=True, slots=True)
class NoisyProcessor:
    """Innocent: other processes take time from all ranks, at random."""

    sigma: float = 0.5

    def apply(self, program: Program, random: np.random.Generator) -> None:
        noise = random.standard_normal(len(program.work_s)).astype(np.float32)
        program.work_s *= np.exp(np.abs(noise) * np.float32(self.sigma))
