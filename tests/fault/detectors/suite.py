"""Synthetic jobs with one fault each, or with what only looks like one, and what is to be found; drawn from a seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from evermesh.fault.detectors import Context, diagnose, kinds
from evermesh.fault.events import Finding
from evermesh.fault.synthetic import JobShape, generate
from evermesh.fault.synthetic import faults as of


@dataclass(frozen=True)
class Case:
    """One job."""

    shape: JobShape
    faults: Sequence[of.Fault]
    kinds: frozenset[str] = frozenset()
    """Of which one is to be found; empty: nothing may be found."""
    rank: int | None = None
    node: str | None = None
    link: tuple[int, int] | None = None
    read_at: float = 1.0

    def is_right(self, finding: Finding) -> bool:
        """Whether a finding says what is the matter."""
        if finding.kind not in self.kinds:
            return False
        if self.link is not None:
            return finding.link == self.link
        if self.rank is not None:
            return finding.rank == self.rank
        return finding.rank is None and (self.node is None or finding.node == self.node)


@dataclass(frozen=True)
class Judged:
    """What the detectors said of a case."""

    found: bool
    """What was to be found."""
    wrong: tuple[Finding, ...]
    """Findings that name somebody, or something, that has nothing to do with it."""


def judge(case: Case, seed: int, context: Context | None = None) -> Judged:
    """Generate the records of a case and diagnose them."""
    job = generate(case.shape, case.faults, seed, read_at=case.read_at)
    findings = diagnose(job.traces, context).findings
    right = [finding for finding in findings if case.is_right(finding)]
    wrong = [one for one in findings if one not in right and (one.kind != kinds.SLOW_JOB or not case.kinds)]
    return Judged(bool(right) or not case.kinds, tuple(wrong))


_DIMS = (
    (2, 1, 1),
    (4, 1, 1),
    (8, 1, 1),
    (2, 2, 1),
    (4, 2, 1),
    (2, 1, 2),
    (2, 2, 2),
    (4, 2, 2),
    (4, 1, 4),
    (4, 4, 4),
    (16, 2, 2),
)
"""dp, tp, pp."""


def _shape(random: np.random.Generator, dims: Sequence[tuple[int, int, int]] = _DIMS) -> JobShape:
    dp, tp, pp = dims[int(random.integers(len(dims)))]
    return JobShape(
        dp=dp,
        tp=tp,
        pp=pp,
        ranks_per_node=int(random.choice([2, 4, 8])),
        steps=int(random.integers(11, 15)),
        micro_batches=int(random.integers(1, 4)),
        layer_s=float(random.choice([5e-4, 2e-3, 1e-2])),
    )


_ALIKE = tuple(dims for dims in _DIMS if dims[0] * dims[1] > 2)
"""Where a rank has at least two others that do the same: of two nobody knows which one is slow, or differs."""


def _of_rank(
    fault: Callable[[np.random.Generator, int, int], of.Fault],
    *found: str,
    dims: Sequence[tuple[int, int, int]] = _DIMS,
) -> Callable[[np.random.Generator], Case]:
    def draw(random: np.random.Generator) -> Case:
        shape = _shape(random, dims)
        rank, step = int(random.integers(shape.num_ranks)), int(random.integers(5, 9))
        return Case(shape, [fault(random, rank, step)], frozenset(found), rank)

    return draw


def _communication_hang(random: np.random.Generator) -> Case:
    shape = _shape(random)
    rank, step = int(random.integers(shape.num_ranks)), int(random.integers(5, 9))
    axis = "tp" if shape.tp > 1 and random.random() < 0.5 else "dp"
    return Case(shape, [of.CommunicationHang(rank, step, axis)], frozenset({kinds.COMMUNICATION_HANG}))


def _slow_network(random: np.random.Generator) -> Case:
    shape = JobShape(dp=4, tp=8, pp=2, ranks_per_node=2, gradient_bytes=1 << 24)  # groups of tp span four nodes
    node = int(random.integers(shape.num_nodes))
    ranks = [rank for rank in range(shape.num_ranks) if shape.node_of(rank) == node]
    fault = of.SlowTransfer(3.0, senders=ranks)
    return Case(shape, [fault], frozenset({kinds.SLOW_NODE, kinds.SLOW_GROUP}))


def _slow_message(random: np.random.Generator) -> Case:
    shape = JobShape(dp=4, pp=4, ranks_per_node=16, activation_bytes=1 << 20)
    source = int(random.integers(12))
    return Case(
        shape,
        [of.SlowTransfer(4.0, link=(source, source + 4))],
        frozenset({kinds.SLOW_LINK}),
        link=(source, source + 4),
    )


def _innocent(*made: Callable[[np.random.Generator, JobShape], of.Fault]) -> Callable[[np.random.Generator], Case]:
    def draw(random: np.random.Generator) -> Case:
        shape = _shape(random)
        return Case(shape, [make(random, shape) for make in made], read_at=float(random.uniform(0.3, 1.0)))

    return draw


def _unbalanced(random: np.random.Generator) -> Case:
    shape = _shape(random, tuple(dims for dims in _DIMS if dims[2] > 1))
    return Case(shape, [of.UnbalancedStage(int(random.integers(shape.pp)))])


def _any_rank(random: np.random.Generator, shape: JobShape) -> int:
    return int(random.integers(shape.num_ranks))


_ORDER = (kinds.DEADLOCK, kinds.SKIPPED)
FAULTS: dict[str, Callable[[np.random.Generator], Case]] = {
    "hang": _of_rank(lambda _, rank, step: of.Hang(rank, step), kinds.HANG),
    "hang of the first": _of_rank(lambda _, rank, step: of.Hang(rank, step, nth=0), kinds.HANG),
    "input hang": _of_rank(lambda _, rank, step: of.Hang(rank, step, nth=0, phase="data"), kinds.HANG),
    "communication hang": _communication_hang,
    "skipped": _of_rank(lambda _, rank, step: of.Skip(rank, step), *_ORDER),
    "skipped in world": _of_rank(lambda _, rank, step: of.Skip(rank, step, "world"), *_ORDER),
    "extra": _of_rank(lambda _, rank, step: of.Extra(rank, step), kinds.EXTRA, kinds.DEADLOCK),
    "other order": _of_rank(lambda _, rank, step: of.Swap(rank, step), kinds.DEADLOCK),
    "operation": _of_rank(lambda _, rank, step: of.Mismatch(rank, step, operation="all_gather"), kinds.MISMATCH),
    "size": _of_rank(lambda _, rank, step: of.Mismatch(rank, step, num_bytes=4096), kinds.SIZE_MISMATCH),
    "dtype": _of_rank(lambda _, rank, step: of.Mismatch(rank, step, dtype="float16"), kinds.DTYPE_MISMATCH),
    "slow rank": _of_rank(
        lambda random, rank, _: of.SlowRank(rank, float(random.uniform(1.4, 2.5))), kinds.SLOW_RANK, dims=_ALIKE
    ),
    "gradual": _of_rank(
        lambda random, rank, _: of.SlowRank(rank, growth=float(random.uniform(0.06, 0.12))),
        kinds.GRADUAL,
        kinds.SLOW_RANK,
        dims=_ALIKE,
    ),
    "slow network": _slow_network,
    "slow link": _slow_message,
}
INNOCENTS: dict[str, Callable[[np.random.Generator], Case]] = {
    "healthy": _innocent(),
    "one long sequence": _innocent(lambda random, shape: of.LongSequence(_any_rank(random, shape), 6)),
    "uneven sequences": _innocent(lambda random, _: of.UnevenSequences(float(random.uniform(0.2, 0.6)))),
    "unbalanced stage": _unbalanced,
    "evaluation": _innocent(lambda random, shape: of.Evaluation(6, 2.0, "evaluate", _any_rank(random, shape))),
    "checkpoint": _innocent(lambda random, shape: of.Evaluation(6, 2.0, "checkpoint", _any_rank(random, shape))),
    "noisy processors": _innocent(lambda random, _: of.NoisyProcessor(float(random.uniform(0.2, 0.8)))),
}


def draw(kind: str, seed: int) -> Case:
    """A case of a kind of FAULTS or INNOCENTS."""
    random = np.random.default_rng([seed, sum(kind.encode())])
    return {**FAULTS, **INNOCENTS}[kind](random)
