"""Which ranks hold a copy of which expert, and the policy that decides it; imports no torch.

Every expert has one owner, which holds its weights and its optimizer state. Experts that many tokens choose may have
copies on other ranks for the length of a step, so that tokens find them at home.

Source: Hecate (FSSDP), arXiv 2502.02581, sections 4 and 5.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True)
class Placement:
    """The experts of one layer on the ranks of an EP group; equal on all of them."""

    experts: int
    ranks: int
    copies: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """By expert: the ranks that hold a copy, ascending, without the owner."""

    def owner(self, expert: int) -> int:
        """The rank that owns ``expert``: every rank owns a block of consecutive ones."""
        return expert // (self.experts // self.ranks)

    @cached_property
    def held(self) -> tuple[tuple[int, ...], ...]:
        """By rank: the experts that it holds, its own first, then copies, both ascending."""
        block = self.experts // self.ranks
        return tuple(
            (
                *range(rank * block, (rank + 1) * block),
                *(expert for expert, ranks in sorted(self.copies.items()) if rank in ranks),
            )
            for rank in range(self.ranks)
        )

    @property
    def most_held(self) -> int:
        """The largest number of experts that a rank holds."""
        return max(map(len, self.held))

    def targets(self, rank: int, nodes: Sequence[int]) -> tuple[int, ...]:
        """By expert: the rank whose copy serves the tokens of ``rank``.

        Its own, else one on its node, else any; where several would do, ranks spread evenly over them.
        """
        return tuple(self._target(rank, expert, nodes) for expert in range(self.experts))

    def slot(self, rank: int, expert: int) -> int:
        """Index of ``expert`` among those that ``rank`` holds."""
        return self.held[rank].index(expert)

    def _target(self, rank: int, expert: int, nodes: Sequence[int]) -> int:
        holders = sorted((self.owner(expert), *self.copies.get(expert, ())))
        if rank in holders:
            return rank
        near = [holder for holder in holders if nodes[holder] == nodes[rank]] or holders
        return near[rank % len(near)]


@dataclass(frozen=True, slots=True)
class HotBudget:
    """What copies of experts may cost."""

    expert_bytes: int
    """Of the weights of one expert, on one rank."""
    memory_bytes: int
    """What a rank can spare for copies of the experts of one layer; their gradients take as much again."""
    hidden_s: float
    """Seconds of computation behind which copies of one layer can travel, such as its attention."""
    bytes_per_s: float
    """Of the slowest link between the ranks."""


@dataclass(frozen=True, slots=True)
class HotDecision:
    """A placement, and why."""

    placement: Placement
    reason: str


def choose_hot(
    loads: Sequence[Sequence[float]], ranks: int, nodes: Sequence[int], budget: HotBudget, window: int = 5
) -> HotDecision:
    """Decide which experts of one layer get copies where, from the tokens that chose each in recent steps.

    Experts whose mean load over the last ``window`` steps is above the mean of all are candidates, and as many as can
    travel behind the computation are hot: those with most load (as in the paper), or one after the other the one with
    most load on the rank that is then the busiest, whichever leaves the busiest rank with less. If all hot ones fit into
    the memory of a rank, every rank gets a copy. Else the slots of all ranks are dealt out one by one, each to the hot
    expert with most load per copy, to a node without a copy first.

    Args:
        loads: by step, oldest first, the tokens that chose each expert, over all ranks.
        ranks: size of the EP group.
        nodes: index of the node of every rank.
        budget: what copies may cost.
        window: steps to look back.
    """
    recent = loads[-window:]
    experts = len(recent[0]) if recent else ranks
    mean = [sum(load) / len(recent) for load in zip(*recent, strict=True)]
    average = sum(mean) / experts
    fits = budget.memory_bytes // (2 * budget.expert_bytes)
    # the owner sends a copy to each other rank, over one link: with one owner of all hot experts nothing overlaps
    hides = int(budget.hidden_s * budget.bytes_per_s / (budget.expert_bytes * max(1, ranks - 1)))
    owners = Placement(experts, ranks)
    candidates = sorted((e for e, load in enumerate(mean) if load > average), key=lambda e: (-mean[e], e))
    choices = candidates[:hides], _of_busiest(candidates, mean, owners, hides)
    hot = min(choices, key=lambda hot: max(_rows_of_ranks(hot, mean, owners)))  # the first of equals
    reason = (
        f"{len(hot)} hot experts of {experts}: {hides} hide behind {budget.hidden_s * 1e3:.3g} ms of computation, "
        f"{fits} fit into {budget.memory_bytes:,} bytes"
    )
    if ranks == 1 or not hot or fits == 0:
        return HotDecision(Placement(experts, ranks), reason)
    if len(hot) <= fits:
        copies = {
            expert: tuple(rank for rank in range(ranks) if rank != owners.owner(expert)) for expert in sorted(hot)
        }
        return HotDecision(Placement(experts, ranks, copies), f"{reason}; on every rank")
    copies = _dealt(hot, mean, fits, owners, nodes)
    return HotDecision(Placement(experts, ranks, copies), f"{reason}; {fits} copies a rank, by load")


def _of_busiest(candidates: Sequence[int], load: Sequence[float], owners: Placement, count: int) -> list[int]:
    """Up to ``count`` candidates, each the first one of the rank that is the busiest without those before it."""
    left, hot = list(candidates), list[int]()
    while left and len(hot) < count:
        rows = _rows_of_ranks(hot, load, owners)
        busiest = max(range(owners.ranks), key=rows.__getitem__)
        best = next((expert for expert in left if owners.owner(expert) == busiest), left[0])
        left.remove(best)
        hot.append(best)
    return hot


def _rows_of_ranks(hot: Collection[int], load: Sequence[float], owners: Placement) -> list[float]:
    """Load by rank when all of them share that of the hot experts."""
    hot = set(hot)
    rows = [sum(load[expert] for expert in hot) / owners.ranks] * owners.ranks
    for expert, tokens in enumerate(load):
        rows[owners.owner(expert)] += tokens if expert not in hot else 0.0
    return rows


def _dealt(
    hot: Sequence[int], load: Sequence[float], slots: int, owners: Placement, nodes: Sequence[int]
) -> dict[int, tuple[int, ...]]:
    """Copies by expert: ``slots`` on every rank, as far as there are hot experts that a rank does not hold."""
    free = [slots] * owners.ranks
    holders = {expert: [owners.owner(expert)] for expert in hot}
    while True:
        open_ = {
            expert: [rank for rank in range(owners.ranks) if free[rank] and rank not in held]
            for expert, held in holders.items()
        }
        candidates = [expert for expert in hot if open_[expert]]
        if not candidates:
            break
        expert = max(candidates, key=lambda expert: load[expert] / len(holders[expert]))  # the first of equals
        reached = {nodes[rank] for rank in holders[expert]}
        rank = min(open_[expert], key=lambda rank: (nodes[rank] in reached, -free[rank], rank))
        holders[expert].append(rank)
        free[rank] -= 1
    return {expert: tuple(sorted(held[1:])) for expert, held in sorted(holders.items()) if len(held) > 1}


__all__ = ["HotBudget", "HotDecision", "Placement", "choose_hot"]
