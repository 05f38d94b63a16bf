"""Replays pipelines: when every stage runs which part of which micro-batch, and when the last one is done.

HDP ranks that run a micro-batch together (members of a ring, sharers of experts) begin and end it together in every
stage. Messages take no time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evermesh.parallelism.batch_plan import BatchPlan, MicroBatch
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pipeline.schedule import Action, Message, Order, PipelineSchedule
from evermesh.parallelism.simulator import Span, Timeline, micro_batch_s, simulate
from evermesh.parallelism.simulator.stages import StageSeconds, stage_seconds

Seconds = Sequence[Sequence[Sequence[StageSeconds]]]
"""By HDP rank, micro-batch and stage."""
Together = Mapping[tuple[int, int], tuple[int, ...]]
"""By HDP rank and micro-batch: the HDP ranks that run it together, where these are more than one."""


@dataclass(frozen=True, slots=True)
class ActionSpan:
    """One action of one pipeline rank of one HDP rank."""

    pipeline_rank: int
    hdp_rank: int
    action: Action
    start_s: float
    stop_s: float


@dataclass(frozen=True, slots=True)
class PipelineTimeline:
    """The spans of all ranks, in the order in which they end up on each rank."""

    spans: tuple[ActionSpan, ...]

    @property
    def makespan_s(self) -> float:
        """When the last span ends, seconds."""
        return max((span.stop_s for span in self.spans), default=0.0)


def simulate_pipeline(plan: BatchPlan, layout: Layout, cost_model: CostModel) -> PipelineTimeline:
    """Replay ``plan`` on the pipelines of ``layout``, whose stages share the time of the model evenly.

    Raises:
        PlanInvalid: the ranks wait for each other in a circle.
    """
    return replay_waves(plan.ranks, plan.lengths, layout, cost_model)


def timeline_of(plan: BatchPlan, layout: Layout, cost_model: CostModel) -> Timeline:
    """When every rank of any layout runs what: with a pipeline every pipeline rank has a row, with its actions apart.

    Raises:
        PlanInvalid: the ranks wait for each other in a circle.
    """
    if not layout.runs_in_waves:
        return simulate(plan, cost_model)
    spans: list[Span] = []
    for found in simulate_pipeline(plan, layout, cost_model).spans:
        micro_batch = plan.ranks[found.hdp_rank][found.action.micro_batch]
        spans.append(
            Span(
                rank=found.hdp_rank * layout.pp + found.pipeline_rank,
                micro_batch=found.action.micro_batch,
                start_s=found.start_s,
                stop_s=found.stop_s,
                sequences=tuple(piece.sequence for piece in micro_batch.pieces),
                ring_size=max((len(piece.ring) for piece in micro_batch.pieces), default=1),
                num_tokens=micro_batch.num_tokens,
                is_backward=found.action.kind != "forward",
            )
        )
    if layout.pp == 1:
        names = [f"rank {hdp_rank}" for hdp_rank in range(layout.hdp)]
    else:
        names = [f"rank {hdp_rank} pp {pp}" for hdp_rank in range(layout.hdp) for pp in range(layout.pp)]
    return Timeline(tuple(sorted(spans, key=lambda span: (span.rank, span.start_s))), tuple(names))


def replay_waves(
    ranks: Sequence[Sequence[MicroBatch]], lengths: Sequence[int], layout: Layout, cost_model: CostModel
) -> PipelineTimeline:
    """``simulate_pipeline`` for the micro-batches of every HDP rank."""
    stages = layout.pipeline.num_stages
    seconds = [
        [
            [stage_seconds(micro_batch_s(micro_batch, lengths, cost_model) / stages, micro_batch)] * stages
            for micro_batch in micro_batches
        ]
        for micro_batches in ranks
    ]
    return replay(layout.pipeline, seconds, run_together(ranks, layout))


def critical_share(layout: Layout) -> float:
    """The part of its time that a micro-batch takes at least from its first action to its last, all stages together.

    Only gradients of weights can be put off, of all stages but the one that ends last.
    """
    schedule = layout.pipeline
    if not schedule.splits_backward:
        return 1.0
    parts = stage_seconds(1.0, MicroBatch((), recompute=layout.recompute))
    return parts.forward + parts.backward_input + parts.backward_weight / schedule.num_stages


def run_together(ranks: Sequence[Sequence[MicroBatch]], layout: Layout) -> Together:
    """Which HDP ranks run which micro-batch together: joined by rings and by shared experts, directly or through others."""
    together: dict[tuple[int, int], tuple[int, ...]] = {}
    for wave in range(max(map(len, ranks), default=0)):
        present = {rank for rank, micro_batches in enumerate(ranks) if wave < len(micro_batches)}
        rings = {piece.ring for rank in present for piece in ranks[rank][wave].pieces if len(piece.ring) > 1}
        sets: list[set[int]] = []
        for members in [*(set(group) & present for group in layout.lock_step_groups), *map(set, rings)]:
            joined = [other for other in sets if other & members]
            sets = [other for other in sets if not other & members] + [members.union(*joined)]
        for members in sets:
            together.update({(rank, wave): tuple(sorted(members)) for rank in members})
    return together


def replay(schedule: PipelineSchedule, seconds: Seconds, together: Together | None = None) -> PipelineTimeline:
    """Run every pipeline through its order as early as it can.

    Args:
        schedule: the same for every pipeline.
        seconds: of every HDP rank, micro-batch and stage.
        together: which HDP ranks run which micro-batch together; by default none do.

    Raises:
        PlanInvalid: the ranks wait for each other in a circle.
    """
    return _Replay(schedule, seconds, together or {}).run()


Place = tuple[int, int]
"""Pipeline rank, HDP rank."""


class _Replay:
    def __init__(self, schedule: PipelineSchedule, seconds: Seconds, together: Together) -> None:
        self.schedule, self.seconds, self.together = schedule, seconds, together
        self.orders: dict[Place, Order] = {
            (rank, hdp_rank): schedule.actions(rank, len(micro_batches))
            for hdp_rank, micro_batches in enumerate(seconds)
            for rank in range(schedule.ranks)
        }
        self.position = dict.fromkeys(self.orders, 0)
        self.free_at = dict.fromkeys(self.orders, 0.0)
        self.arrived: dict[tuple[Message, int], float] = {}
        self.spans: list[ActionSpan] = []

    def run(self) -> PipelineTimeline:
        to_visit = list(self.orders)
        while to_visit:
            to_visit += self._advance(to_visit.pop())
        stuck = sorted(place for place, order in self.orders.items() if self.position[place] < len(order))
        if stuck:
            raise PlanInvalid(
                f"the pipeline and HDP ranks {stuck[:4]} wait for each other in a circle; the plan cannot run."
            )
        return PipelineTimeline(tuple(self.spans))

    def _advance(self, place: Place) -> list[Place]:
        """Run the next action of ``place`` if everything for it is there; return the places that may go on then."""
        action = self._next(place)
        if action is None:
            return []
        rank, hdp_rank = place
        alone = action.kind == "backward weight"
        members = (hdp_rank,) if alone else self.together.get((hdp_rank, action.micro_batch), (hdp_rank,))
        if any(self._next((rank, member)) != action for member in members):
            return []
        start = max(self._ready_at(action, (rank, member)) for member in members)
        if start == float("inf"):
            return []
        stop = start + max(self.seconds[m][action.micro_batch][action.stage].of(action.kind) for m in members)
        return [freed for member in members for freed in self._end(action, (rank, member), start, stop)]

    def _next(self, place: Place) -> Action | None:
        order = self.orders.get(place, ())
        return order[self.position[place]] if order and self.position[place] < len(order) else None

    def _ready_at(self, action: Action, place: Place) -> float:
        message = self.schedule.received(action)
        arrived = self.arrived.get((message, place[1]), float("inf")) if message is not None else 0.0
        return max(self.free_at[place], arrived)

    def _end(self, action: Action, place: Place, start: float, stop: float) -> list[Place]:
        rank, hdp_rank = place
        self.spans.append(ActionSpan(rank, hdp_rank, action, start, stop))
        self.free_at[place] = stop
        self.position[place] += 1
        message = self.schedule.sent(action)
        if message is None:
            return [place]
        self.arrived[message, hdp_rank] = stop
        return [place, (self.schedule.rank_of(message.stage), hdp_rank)]


__all__ = [
    "ActionSpan",
    "PipelineTimeline",
    "StageSeconds",
    "critical_share",
    "replay",
    "replay_waves",
    "run_together",
    "simulate_pipeline",
    "stage_seconds",
]
