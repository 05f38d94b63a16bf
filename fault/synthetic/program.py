"""What every rank of a synthetic job is going to do: its records without times, and the work before each."""

from dataclasses import dataclass, field

import numpy as np

from evermesh.fault.recorder.record import DTYPES, NO_PEER, OPERATIONS, PHASES, RECORD, Flags
from evermesh.fault.synthetic.shape import AXES, JobShape

SLACK = 4
"""Records by which a fault may lengthen the program of a rank."""
SITES = ("", "batch digest", "forward", "backward", "gradients", "step guard", "parameters", "evaluation", "checkpoint")
_FIRST = OPERATIONS.index("send")


@dataclass
class Program:
    """The programs of all ranks, which faults change before the job runs."""

    shape: JobShape
    records: np.ndarray
    """Array of RECORD, the programs of all ranks one after another."""
    work_s: np.ndarray
    """Array [records] of float32: computation before each; infinite: it never enters."""
    starts: np.ndarray
    counts: np.ndarray
    send_factor: np.ndarray
    """Array [ranks]: how much longer what it sends to other nodes takes; so ``receive_factor``."""
    receive_factor: np.ndarray
    link_factor: dict[tuple[int, int], float] = field(default_factory=dict)
    """By the two ranks, in the direction in which it is slow."""
    slow_from_step: int = 0
    """From when on these factors hold."""
    frozen: set[tuple[int, int]] = field(default_factory=set)
    """Collectives, by group and number, that all enter and none leaves."""
    phases: dict[int, str] = field(default_factory=dict)
    """Phase that a rank that hangs says it is in."""

    def rows(self, rank: int) -> slice:
        """Where the program of ``rank`` is."""
        start = int(self.starts[rank])
        return slice(start, start + int(self.counts[rank]))

    def find(self, rank: int, step: int, axis: str, operation: str | None = None, nth: int = 0) -> int:
        """Index in the program of ``rank`` of the ``nth`` record of a step in its group along ``axis``."""
        own = self.records[self.rows(rank)]
        chosen = (own["step"] == step) & (own["group"] == AXES.index(axis))
        if operation is not None:
            chosen &= own["operation"] == OPERATIONS.index(operation)
        return int(np.flatnonzero(chosen)[nth])

    def remove(self, rank: int, index: int) -> None:
        """Take a record out of the program of ``rank``; its work stays."""
        rows = self.rows(rank)
        records, work = self.records[rows], self.work_s[rows]
        if index + 1 < len(work):
            work[index + 1] += work[index]
        records[index:-1] = records[index + 1 :].copy()
        work[index:-1] = work[index + 1 :].copy()
        self.counts[rank] -= 1
        self.renumber(rank)

    def insert(self, rank: int, index: int, record: np.void, work_s: float = 0.0) -> None:
        """Put a record before that at ``index``."""
        self.counts[rank] += 1
        rows = self.rows(rank)
        records, work = self.records[rows], self.work_s[rows]
        records[index + 1 :] = records[index:-1].copy()
        work[index + 1 :] = work[index:-1].copy()
        records[index], work[index] = record, work_s
        self.renumber(rank)

    def renumber(self, rank: int) -> None:
        """Number the records of ``rank`` as it would itself, in order."""
        own = self.records[self.rows(rank)]
        own["sequence"] = np.arange(1, len(own) + 1)
        seen: dict[tuple[int, ...], int] = {}
        for record in own:
            is_message = record["operation"] >= _FIRST
            key = (int(record["group"]), *((int(record["peer"]), int(record["operation"])) if is_message else ()))
            record["number"] = seen.get(key, 0)
            seen[key] = seen.get(key, 0) + 1


def program_of(shape: JobShape, seed: int) -> Program:
    """A healthy job. Deterministic."""
    random = np.random.default_rng(seed)
    templates = [_step_of(shape, stage) for stage in range(shape.pp)]
    per_stage = shape.dp * shape.tp
    lengths = np.repeat([len(records) * shape.steps for records, _ in templates], per_stage)
    starts = np.concatenate([[0], np.cumsum(lengths + SLACK)])
    all_records, work_s = np.zeros(starts[-1], RECORD), np.zeros(starts[-1], np.float32)
    speed = np.exp(shape.heterogeneity * random.standard_normal(shape.num_ranks)).astype(np.float32)
    for stage, (template, work) in enumerate(templates):
        first = int(starts[stage * per_stage])
        size = len(template) * shape.steps + SLACK
        span = slice(first, first + size * per_stage)
        own_speed = speed[stage * per_stage : (stage + 1) * per_stage]
        _fill(all_records[span].reshape(per_stage, size), template, shape)
        block = work_s[span].reshape(per_stage, size)[:, : size - SLACK]
        block[:] = random.standard_normal(block.shape, np.float32)
        block *= np.float32(shape.jitter)
        np.exp(block, out=block)
        block *= np.tile(work, shape.steps)
        block *= own_speed[:, None]
    ones = np.ones(shape.num_ranks)
    return Program(shape, all_records, work_s, starts[:-1], lengths.astype(np.int64), ones, ones.copy())


def _fill(block: np.ndarray, template: np.ndarray, shape: JobShape) -> None:
    """The steps of one rank, and the same for all ranks of the stage."""
    per_step = len(template)
    one = np.tile(template, shape.steps)
    one["sequence"] = np.arange(1, len(one) + 1)
    step = np.repeat(np.arange(shape.steps, dtype=np.uint32), per_step)
    one["step"] = step + shape.first_step
    key = template["group"].astype(np.int64)
    key = np.where(template["operation"] >= _FIRST, (template["peer"] + 1) * 64 + template["operation"] * 8 + key, key)
    for value in np.unique(key):
        chosen = key == value
        one["number"][np.tile(chosen, shape.steps)] = np.arange(int(chosen.sum()) * shape.steps)
    block[:, : len(one)] = one


def _step_of(shape: JobShape, stage: int) -> tuple[np.ndarray, np.ndarray]:
    """Records of one step of a rank of ``stage``, all micro-batches forward, then backward, and the work before each."""
    writer = _Writer(shape)
    writer.add("world", "all_gather", 32, "uint8", "batch digest", "data")
    for _ in range(shape.micro_batches):
        writer.message("receive", stage, stage - 1, "forward")
        writer.layers(1.0, "forward")
        writer.message("send", stage, stage + 1, "forward")
    for _ in range(shape.micro_batches):
        writer.message("receive", stage, stage + 1, "backward")
        writer.layers(2.0, "backward")
        writer.message("send", stage, stage - 1, "backward")
    writer.add("dp", "reduce_scatter", shape.gradient_bytes, "float32", "gradients")
    writer.add("world", "all_reduce", 32, "float64", "step guard")
    writer.add("dp", "all_gather", shape.gradient_bytes, "bfloat16", "parameters")
    return np.array(writer.records, RECORD), np.array(writer.work)


class _Writer:
    def __init__(self, shape: JobShape) -> None:
        self.shape = shape
        self.records: list[tuple[int, ...]] = []
        self.work: list[float] = []
        self.pending_s = shape.layer_s / 10

    def add(
        self,
        axis: str,
        operation: str,
        num_bytes: int,
        dtype: str,
        site: str,
        phase: str = "train",
        peer: int = NO_PEER,
    ) -> None:
        """One record, if the axis has several ranks; the work that was done since the last one is before it."""
        if (self.shape.num_ranks if axis == "world" else getattr(self.shape, axis)) == 1:
            return
        record = make_record(axis, operation, num_bytes, dtype, site, phase, peer)
        self.records.append(record)
        self.work.append(self.pending_s)
        self.pending_s = self.shape.layer_s / 50

    def layers(self, cost: float, site: str) -> None:
        for _ in range(self.shape.layers):
            self.pending_s += self.shape.layer_s * cost
            self.add("tp", "all_reduce", self.shape.activation_bytes, "bfloat16", site)

    def message(self, operation: str, stage: int, other: int, site: str) -> None:
        if 0 <= other < self.shape.pp:
            self.add("pp", operation, self.shape.activation_bytes, "bfloat16", site, peer=other)


def make_record(
    axis: str, operation: str, num_bytes: int, dtype: str, site: str, phase: str = "train", peer: int = NO_PEER
) -> tuple[int, ...]:
    """Fields of a RECORD without times and numbers."""
    flags = int(Flags.END_SEEN | Flags.BLOCKING)
    place = (AXES.index(axis), 0, 0, SITES.index(site), peer)
    kinds = (OPERATIONS.index(operation), DTYPES.index(dtype), PHASES.index(phase), flags)
    return (0, 0, 0, 0, num_bytes, *place, *kinds)
