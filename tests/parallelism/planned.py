"""Random batches for random layouts, costs and pools, for all three planners."""

import random
from typing import Any, Literal, NamedTuple

from evermesh.parallelism import BatchPlan, CostModel, Layout, plan_batch
from evermesh.parallelism.pool import Pool

Kind = Literal["free", "lock-step", "pipelines"]
KINDS: tuple[Kind, ...] = ("free", "lock-step", "pipelines")
ZERO_3 = {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"}
_MEMORY: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"activations": "recompute"},
    {"activations": "recompute", "keep_capacity": 150},
    {"activations": "offload", "offload": 0.5, "keep_capacity": 200},
    {"activations": "offload", "offload": "auto"},
    {"activations": "offload", "offload": "auto", "keep_capacity": 200},
)
_SHARING: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"ulysses": 2},
    {"gathers_keys": True},
    {"ulysses": 4, "gathers_keys": True},
)
_FORM: dict[Kind, tuple[dict[str, Any], ...]] = {
    "free": ({}, {}, {"most_peers": 16}),
    "lock-step": ({"ep": 2}, {"ep": 4}, {"tp": 2, "ep": 2, "etp": 2}, {"sharding": ZERO_3}),
    "pipelines": (
        {"pp": 2},
        {"pp": 4, "schedule": "gpipe"},
        {"pp": 3, "schedule": "zero-bubble"},
        {"pp": 2, "schedule": "interleaved-1f1b", "virtual_stages": 2},
        {"pp": 2, "schedule": "zero-bubble-v", "virtual_stages": 2},
        {"pp": 2, "ep": 2},
    ),
}


class Case(NamedTuple):
    """What a batch is planned for."""

    lengths: tuple[int, ...]
    layout: Layout
    cost: CostModel
    pool: Pool

    def plan(self) -> BatchPlan:
        return plan_batch(self.lengths, self.layout, self.cost, pool=self.pool)


def draw(seed: int, kind: Kind | None = None, most_ranks: int = 64) -> Case:
    """The same case for the same arguments."""
    dice = random.Random(seed)
    often: tuple[Kind, ...] = ("free", "free", "lock-step", "pipelines")
    chosen = dice.choice(often) if kind is None else kind
    form = dice.choice(_FORM[chosen])
    if chosen == "free":
        hdp = dice.randint(1, min(most_ranks, dice.choice((4, 16, 64, 64))))
    else:
        hdp = dice.choice([ranks for ranks in (4, 8, 16, 32) if ranks <= max(4, most_ranks)])
    capacity = dice.choice((300, 500, 1000))
    document = {"hdp": hdp, "capacity": capacity, **form, **dice.choice(_MEMORY), **dice.choice(_SHARING)}
    if document.get("gathers_keys"):
        document.pop("most_peers", None)  # who gathers exchanges messages with all of its ring
    return Case(
        _lengths(dice, hdp * capacity, dice.randint(0, 3 * hdp + 12)),
        Layout.model_validate(document),
        _cost(dice),
        Pool.of(
            hdp,
            dice.choice((None, 2, 3, 4, 8)),
            [dice.choice((1.0, 1.0, 1.0, 0.97, 0.7, 1.1)) for _ in range(hdp)] if dice.random() < 0.3 else (),
        ),
    )


def _lengths(dice: random.Random, most: int, number: int) -> tuple[int, ...]:
    spread, middle = dice.uniform(0.2, 1.8), dice.choice((3.0, 4.5, 6.0))
    return tuple(max(1, min(most, int(dice.lognormvariate(middle, spread)))) for _ in range(number))


def _cost(dice: random.Random) -> CostModel:
    def sometimes(coefficient: float) -> float:
        return dice.choice((0.0, coefficient, coefficient * dice.uniform(0.1, 10.0)))

    step_s, token_s = sometimes(1e-5), sometimes(1e-6)
    slower, again_s = dice.choice((None, 1.0, 5.0)), sometimes(3e-6)
    return CostModel(
        token_s=1e-5 * dice.uniform(0.3, 3.0),
        pair_s=sometimes(2e-8),
        micro_batch_s=sometimes(1e-3),
        piece_s=sometimes(1e-5),
        tile=dice.choice((1, 1, 16, 128)),
        expert_token_s=sometimes(1e-6),
        recompute_token_s=again_s,
        recompute_pair_s=sometimes(3e-9),
        offload_saves_token_s=again_s * dice.uniform(0.0, 1.0),
        host_token_s=sometimes(1e-6),
        host_products_token_s=sometimes(3e-6),
        ring_step_s=step_s,
        ring_token_s=token_s,
        network_step_s=None if slower is None else slower * step_s,
        network_token_s=None if slower is None else slower * token_s,
        head_token_s=sometimes(1e-6),
    )
