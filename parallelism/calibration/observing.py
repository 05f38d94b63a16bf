"""What a measured time says about coefficients: how often each is in the time that the cost model predicts.

Ranks that share a sequence, or keep step, run a micro-batch together. Whoever comes early waits inside, so the shortest time
that a member measures is that of the last one to come, who waited for nobody; it is as long as the member with most work
needs.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from evermesh.parallelism.batch_plan import BatchPlan, MicroBatch
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.rank_work import PackedRanks
from evermesh.parallelism.simulator.aggregate import micro_batch_s, offload_s, sharing_of, work_of

Seconds = NDArray[np.float64]

COEFFICIENTS = (
    "token_s",
    "pair_s",
    "micro_batch_s",
    "piece_s",
    "recompute_token_s",
    "recompute_pair_s",
    "ring_step_s",
    "ring_token_s",
    "network_step_s",
    "network_token_s",
    "head_token_s",
)
"""Those of ``CostModel`` that are fitted.

``expert_token_s`` always comes with ``token_s`` and keeps its ratio to it, and so does ``offload_saves_token_s`` with
``recompute_token_s``. What copies to host memory take is not fitted: what they add by the model in use is taken off.
"""
_INDEX = {name: index for index, name in enumerate(COEFFICIENTS)}


class Overlap(NamedTuple):
    """Attention of a sequence in a ring, and the traffic that it hides: the longer of the two counts."""

    pairs: float
    recomputed: bool
    passed_tokens: float
    crosses_nodes: bool


class Observation(NamedTuple):
    """A micro-batch that somebody ran."""

    seconds: float
    counts: tuple[float, ...]
    """How often each of ``COEFFICIENTS`` is in its time, but for the overlaps."""
    overlaps: tuple[Overlap, ...] = ()

    def to_list(self) -> list[Any]:
        """As JSON values."""
        return [self.seconds, list(self.counts), [list(overlap) for overlap in self.overlaps]]

    @classmethod
    def from_list(cls, values: Sequence[Any]) -> Self:
        """What ``to_list`` gave."""
        seconds, counts, overlaps = values
        return cls(float(seconds), tuple(map(float, counts)), tuple(Overlap(*overlap) for overlap in overlaps))


def observe_micro_batch(
    micro_batch: MicroBatch, lengths: Sequence[int], seconds: float, cost: CostModel, pool: Pool | None = None
) -> Observation:
    """A micro-batch that took so long on a rank of speed 1 that waited for nobody; ``cost`` is the model in use."""
    counts, overlaps = [0.0] * len(COEFFICIENTS), []
    counts[_INDEX["micro_batch_s"]] = 1.0
    recomputed, unit = micro_batch.recompute == "block", _unit(cost.tile)
    again = float(recomputed)
    if recomputed and cost.offloads:
        saved = micro_batch.offload * cost.offload_saves_token_s
        tokens = work_of(micro_batch, lengths, cost).tokens
        again -= saved / cost.recompute_token_s if saved else 0.0
        # never more than half: the model may be far off yet
        seconds = max(seconds / 2, seconds - (offload_s(micro_batch, lengths, cost) + saved * tokens))
    for piece in micro_batch.pieces:
        sharing = sharing_of(piece, pool)
        parts = unit.parts(lengths[piece.sequence], sharing)
        network = sharing.crosses_nodes and sharing.ring > sharing.heads
        counts[_INDEX["piece_s"]] += 1.0
        counts[_INDEX["token_s"]] += parts.products
        counts[_INDEX["recompute_token_s"]] += parts.products * again
        counts[_INDEX["head_token_s"]] += parts.exchanged
        counts[_INDEX["network_step_s" if network else "ring_step_s"]] += parts.steps
        if parts.passed and not parts.gathers:
            overlaps.append(Overlap(parts.attention, recomputed, parts.passed, network))
            continue
        counts[_INDEX["pair_s"]] += parts.attention
        counts[_INDEX["recompute_pair_s"]] += parts.attention * recomputed
        counts[_INDEX["network_token_s" if network else "ring_token_s"]] += parts.passed
    return Observation(seconds, tuple(counts), tuple(overlaps))


def observations(
    plan: BatchPlan,
    measured_s: Sequence[float],
    layout: Layout,
    cost: CostModel,
    *,
    pool: Pool | None = None,
    most: int = 64,
) -> list[Observation]:
    """What the times of all micro-batches of a step say; of more than ``most`` sets that ran together, evenly chosen ones.

    Args:
        plan: of the step, for ranks without a pipeline.
        measured_s: of every micro-batch, rank by rank in their order; infinite where nobody measured.
        layout: says who keeps step with whom.
        cost: the model in use; says who of a set has most work.
        pool: nodes and speeds of the ranks.
        most: sets.
    """
    packed = plan.ranks if isinstance(plan.ranks, PackedRanks) else PackedRanks.of(plan.ranks, plan.lengths)
    seconds = np.asarray(measured_s, np.float64)
    together = _together(packed, layout)
    sets = np.unique(together)
    chosen = sets[np.unique(np.linspace(0, len(sets) - 1, min(most, len(sets))).round().astype(np.int64))]
    holder = np.repeat(np.arange(len(packed)), np.diff(packed.rank_start))
    order = np.argsort(together, kind="stable")
    bounds = np.searchsorted(together[order], np.stack([chosen, chosen + 1]))
    found = []
    for start, stop in bounds.T.tolist():
        members = order[start:stop]
        least_s = float(seconds[members].min())
        if np.isfinite(least_s) and least_s > 0:
            micro_batch, speed = _slowest(packed, members, holder, plan.lengths, cost, pool)
            found.append(observe_micro_batch(micro_batch, plan.lengths, least_s * speed, cost, pool))
    return found


def _slowest(
    packed: PackedRanks,
    members: NDArray[np.int64],
    holder: NDArray[np.int64],
    lengths: Sequence[int],
    cost: CostModel,
    pool: Pool | None,
) -> tuple[MicroBatch, float]:
    """The micro-batch of the member that needs longest, and its speed."""

    def candidates() -> Iterator[tuple[float, MicroBatch, float]]:
        for index in members.tolist():
            rank = int(holder[index])
            micro_batch = packed.micro_batch(rank, index)
            speed = pool.speeds[rank] if pool is not None else 1.0
            yield micro_batch_s(micro_batch, lengths, cost, pool) / speed, micro_batch, speed

    _, micro_batch, speed = max(candidates(), key=lambda candidate: candidate[0])
    return micro_batch, speed


def _together(packed: PackedRanks, layout: Layout) -> NDArray[np.int64]:
    """A number for every micro-batch that those have in common which run together, [M]."""
    root = np.arange(len(packed.micro_batch_start) - 1)
    holder = np.repeat(np.arange(len(packed)), np.diff(packed.rank_start))
    of_piece = np.repeat(root, np.diff(packed.micro_batch_start))
    links = [packed.sequence]
    joined = [of_piece]
    if packed.lock_step is not None:
        for number, group in enumerate(layout.lock_step_groups):
            inside = np.flatnonzero(np.isin(holder, group))
            # behind the numbers of sequences, one for every index of every group
            first = len(packed.lengths) + number * (int(packed.lock_step.max(initial=0)) + 1)
            links.append(first + packed.lock_step[inside])
            joined.append(inside)
    return _joined(root, np.concatenate(links), np.concatenate(joined))


def _joined(root: NDArray[np.int64], links: NDArray[np.int64], members: NDArray[np.int64]) -> NDArray[np.int64]:
    """The least number among all that are linked, however indirectly; ``links[i]`` is one that ``members[i]`` has."""
    least = np.full(int(links.max(initial=-1)) + 1, len(root), np.int64)
    while True:
        np.minimum.at(least, links, root[members])
        after = root.copy()
        np.minimum.at(after, members, least[links])
        if np.array_equal(after, root):
            return root
        root = after


def _unit(tile: int) -> CostModel:
    """A model that counts: a token, a pair and a step are a second each."""
    return CostModel(token_s=1.0, pair_s=1.0, ring_step_s=1.0, ring_token_s=1.0, head_token_s=1.0, tile=tile)


__all__ = ["COEFFICIENTS", "Observation", "Overlap", "observations", "observe_micro_batch"]
