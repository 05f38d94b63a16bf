"""Records of jobs that never ran, as their rings would hold them: a pure function of shape, faults and seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evermesh.fault.recorder.record import PHASES
from evermesh.fault.recorder.trace import RankTrace
from evermesh.fault.synthetic.faults import Fault
from evermesh.fault.synthetic.program import SITES, SLACK, Program, program_of
from evermesh.fault.synthetic.running import run_events
from evermesh.fault.synthetic.shape import AXES, Clock, JobShape

BEGIN_NS = 1_000_000_000_000
_WALL_NS = 1_700_000_000_000_000_000


@dataclass(frozen=True, slots=True)
class SyntheticJob:
    """What the rings of a job held, and the true time."""

    shape: JobShape
    traces: tuple[RankTrace, ...]
    read_ns: int
    """True time when the rings were read."""

    def true_offset_ns(self, node: int, at_ns: int) -> float:
        """Clock of ``node`` minus true time, at a true time."""
        clock = _clock_of(self.shape, node)
        return clock.offset_ns + clock.drift_ppm * 1e-6 * (at_ns - BEGIN_NS)


def generate(
    shape: JobShape, faults: Sequence[Fault] = (), seed: int = 0, *, wait_s: float = 5.0, read_at: float = 1.0
) -> SyntheticJob:
    """The rings of a job.

    They are read when ``read_at`` of its time is over or, where it stands still, ``wait_s`` after anybody did anything.
    """
    random = np.random.default_rng([seed, 1])
    program = program_of(shape, seed)
    for fault in faults:
        fault.apply(program, random)
    words = program.records.view(np.uint64).reshape(-1, 8)
    entered = _run(program, words, random)
    lasts = program.starts + np.maximum(entered, 1) - 1
    last_ns = int(max(words[lasts, 1].max(), words[lasts, 3].max()))
    is_still = bool((entered < program.counts).any()) or not words[lasts, 3].all()
    read_ns = last_ns + int(wait_s * 1e9) if is_still else BEGIN_NS + int((last_ns - BEGIN_NS) * read_at)
    traces = tuple(_trace(program, rank, int(entered[rank]), read_ns) for rank in range(shape.num_ranks))
    return SyntheticJob(shape, traces, read_ns)


def _run(program: Program, words: np.ndarray, random: np.random.Generator) -> np.ndarray:
    shape, groups = program.shape, program.shape.groups
    members = np.concatenate([np.array(group.ranks, np.int64) for group in groups])
    sizes = np.array([len(group.ranks) for group in groups])
    member_starts = np.concatenate([[0], np.cumsum(sizes)])
    place_of = np.full(shape.group_of.shape, -1, np.int64)
    for group in groups:
        place_of[list(group.ranks), AXES.index(group.axis)] = np.arange(len(group.ranks))
    most = int(program.counts.max()) + 1
    used = np.bincount(
        program.records["group"], minlength=len(AXES)
    )  # an upper bound of what a rank does along an axis
    per_axis = np.minimum(most, used)
    instances = [int(per_axis[AXES.index(group.axis)]) for group in groups]
    per_edge = shape.micro_batches * shape.steps + SLACK
    messages = [2 * len(group.ranks) * per_edge if group.axis == "pp" else 0 for group in groups]
    instance_starts = np.concatenate([[0], np.cumsum(instances)])
    group_factor, message_factor = _factors(program)
    frozen = np.array([instance_starts[group] + number for group, number in program.frozen], np.int64)
    jitters = np.maximum(1 + shape.transfer_jitter * random.standard_normal(4096), 0.2)
    result: np.ndarray = run_events(
        words,
        program.work_s,
        program.starts,
        program.counts,
        shape.group_of,
        place_of,
        members,
        member_starts,
        instance_starts,
        np.concatenate([[0], np.cumsum(messages)]),
        group_factor,
        message_factor,
        program.slow_from_step,
        frozen,
        jitters,
        shape.latency_s * 1e9,
        1e9 / shape.bytes_per_s,
        BEGIN_NS,
    )
    return result


def _factors(program: Program) -> tuple[np.ndarray, np.ndarray]:
    """By how much the collectives of every group, and its messages to the next and the previous member, are slower."""
    of_groups, of_messages = [], []
    for group in program.shape.groups:
        ranks = np.array(group.ranks)
        onward, back = (_edge_factors(program, ranks, np.roll(ranks, shift)) for shift in (-1, 1))
        of_groups.append(onward.max())
        of_messages.append(np.stack([onward, back], axis=1).ravel())
    return np.array(of_groups), np.concatenate(of_messages)


def _edge_factors(program: Program, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
    per_node = program.shape.ranks_per_node
    crosses = sources // per_node != targets // per_node
    factors = np.where(crosses, program.send_factor[sources] * program.receive_factor[targets], 1.0)
    for (source, target), factor in program.link_factor.items():
        factors[(sources == source) & (targets == target)] *= factor
    return factors


def _trace(program: Program, rank: int, entered: int, read_ns: int) -> RankTrace:
    shape = program.shape
    rows = program.rows(rank)
    own = program.records[rows][:entered]
    own = own[: int(np.searchsorted(own["entered_ns"], np.uint64(read_ns), side="right"))]
    late = own["ended_ns"] > read_ns
    own["ended_ns"][late] = 0
    upcoming = program.records[rows][min(len(own), int(program.counts[rank]) - 1)]
    of_next = upcoming if not len(own) or own["ended_ns"][-1] else own[-1]
    own = own[-shape.ring_capacity :]
    node = shape.node_of(rank)
    clock = _clock_of(shape, node)
    if clock != Clock():
        for name in ("entered_ns", "enqueued_ns", "ended_ns"):
            own[name] = np.where(own[name] > 0, _local(own[name].astype(np.int64), clock), 0)
    offset_ns = int(_local(np.array([read_ns]), clock)[0]) - read_ns
    return RankTrace(
        rank=rank,
        node=f"node{node}",
        pid=10_000 + rank,
        records=own,
        groups={axis: shape.groups[group] for axis, group in enumerate(shape.group_of[rank].tolist()) if group >= 0},
        sites=dict(enumerate(SITES)),
        step=int(of_next["step"]),
        phase=program.phases.get(rank, PHASES[of_next["phase"]]),
        read_ns=read_ns + offset_ns,
        wall_offset_ns=_WALL_NS - offset_ns,
    )


def _local(true_ns: np.ndarray, clock: Clock) -> np.ndarray:
    drift_ns = np.round((true_ns - BEGIN_NS) * (clock.drift_ppm * 1e-6)).astype(np.int64)
    local: np.ndarray = true_ns + clock.offset_ns + drift_ns
    return local


def _clock_of(shape: JobShape, node: int) -> Clock:
    return shape.clocks[node] if node < len(shape.clocks) else Clock()
