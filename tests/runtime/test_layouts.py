"""A layout never changes the mathematics: loss, gradients, their norm and a clipped update equal one process.

Every ring of every plan has a drawn scheme of attention.
"""

import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import pytest

from evermesh.parallelism import Layout, plan_batch
from evermesh.parallelism.layout import ActivationPolicy
from evermesh.runtime.model.config import ModelConfig
from tests.runtime.parity import COST, Case, with_schemes, worst_errors

RANKS = 8
LENGTHS = (1, 97, 40, 13, 2, 61, 29, 7, 22, 5)
SIZES = {"hidden": 32, "layers": 5, "heads": 8, "kv_heads": 4, "ffn": 48, "initial_std": 0.2}
EXPERTS = {"experts": 8, "ffn": 16, "first_dense_layers": 1}
MODELS = {
    "dense": SIZES,
    "tied": SIZES | {"tied_embeddings": True, "qk_norm": True, "qkv_bias": True, "sliding_window": 20},
    "parallel blocks": SIZES | {"parallel_block": True},
    "experts": SIZES | {"moe": EXPERTS | {"shared_ffn": 16}},
    "experts, tied": SIZES
    | {"tied_embeddings": True, "moe": EXPERTS | {"router": "sigmoid", "shared_ffn": 16, "shared_gate": True}},
    "balanced documents": SIZES | {"moe": EXPERTS | {"balancing": {"kind": "document_loss"}, "capacity_factor": 1.0}},
}
CONFIGS = {name: ModelConfig.model_validate(values) for name, values in MODELS.items()}
SCHEDULES = (
    ("1f1b", 1),
    ("gpipe", 1),
    ("zero-bubble", 1),
    ("zero-bubble", 2),
    ("interleaved-1f1b", 2),
    ("zero-bubble-v", 2),
)


TIERS: tuple[dict[str, Any], ...] = (
    {},
    {"gradients": "all"},
    {"gradients": "all", "keep_for": "micro_batch"},
    {"parameters": "all", "gradients": "all"},
    {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"},
    {"parameters": 2, "gradients": 2, "states": 2, "keep_for": "micro_batch"},
    {"parameters": 2, "gradients": 4, "states": "all"},
    {"parameters": 2, "gradients": 2, "states": "all", "keep_for": "micro_batch"},
)
"""What the HDP ranks divide: ZeRO-1, -2, -3, hybrid sharding, three levels."""


class Choice(NamedTuple):
    """One point of the matrix."""

    model: str
    layout: Layout


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _factorisations(*, experts: bool) -> Iterator[dict[str, int]]:
    """All ways to spread eight ranks: pp x tp x hdp, and for experts ep x etp over each stage."""
    for pp, tp in itertools.product((1, 2, 4), (1, 2, 4)):
        if pp * tp > RANKS:
            continue
        stage = RANKS // pp
        for ep in _divisors(stage) if experts else [1]:
            for etp in _divisors(stage // ep) if experts else [1]:
                yield {"pp": pp, "tp": tp, "hdp": stage // tp, "ep": ep, "etp": etp}


def _choices() -> list[Choice]:
    """Every factorisation with every schedule that fits it, every model, all tiers, all that may become of activations."""
    found = []
    for model, activations in itertools.product(MODELS, get_args(ActivationPolicy)):
        has_experts = CONFIGS[model].moe is not None
        spreads = itertools.product(_factorisations(experts=has_experts), SCHEDULES, TIERS)
        for degrees, (schedule, stages), tiers in spreads:
            if degrees["pp"] * stages > SIZES["layers"] or (degrees["pp"] == 1 and schedule != "1f1b"):
                continue
            if any(degrees["hdp"] % size for size in tiers.values() if isinstance(size, int)):
                continue
            if degrees["hdp"] == 1 and tiers:
                continue
            hot = 1 if degrees["ep"] > 1 and activations == "recompute" else 0
            values: dict[str, Any] = degrees | {"schedule": schedule, "virtual_stages": stages, "hot_experts": hot}
            values |= {"sharding": tiers, "activations": activations}
            values["offload"] = 0.5 if activations == "offload" else 0.0
            layout = Layout.model_validate(values | {"capacity": max(41, -(-97 // degrees["hdp"]))})
            found.append(Choice(model, layout))
    return found


def _every_factorisation() -> list[Choice]:
    """One choice for every factorisation, dense and with experts."""
    chosen: dict[Any, Choice] = {}
    for choice in random.Random(1).sample(_choices(), len(_choices())):
        layout = choice.layout
        has_experts = CONFIGS[choice.model].moe is not None
        chosen.setdefault((has_experts, layout.pp, layout.tp, layout.ep, layout.etp), choice)
    return list(chosen.values())


def _every_pair() -> list[Choice]:
    """Choices that together have every pair of values of any two of: model, degrees, schedule, activations, tiers."""
    choices = random.Random(2).sample(_choices(), len(_choices()))
    missing = {pair for choice in choices for pair in _pairs(choice)}
    chosen = []
    while missing:
        candidates = [choice for choice in choices if missing & _pairs(choice)][:200]
        best = max(candidates, key=lambda choice: len(missing & _pairs(choice)))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(choice: Choice) -> set[Any]:
    layout = choice.layout
    values = {
        "model": choice.model,
        "pp": layout.pp,
        "tp": layout.tp,
        "ep": layout.ep,
        "etp": layout.etp,
        "schedule": (layout.schedule, layout.virtual_stages),
        "activations": layout.activations,
        "sharding": layout.sharding,
    }
    return set(itertools.combinations(sorted(values.items(), key=lambda item: item[0]), 2))


def _check(choices: list[Choice]) -> None:
    cases = []
    for number, (model, planned) in enumerate(choices):
        layout = planned.model_copy(update={"ulysses": SIZES["heads"] // planned.tp, "gathers_keys": True})
        plan = with_schemes(plan_batch(LENGTHS, planned, COST), layout, seed=number)
        cases.append(Case(plan, "float64", CONFIGS[model], layout))
    assert {len(schemes) for schemes in map(_schemes, cases)} - {0, 1}, "no plan with several schemes"
    for choice, error in zip(choices, worst_errors(cases), strict=True):
        assert error <= 1e-9, choice


def _schemes(case: Case) -> set[tuple[int, int, bool]]:
    """Ring size, heads and gathering of the rings of a plan."""
    pieces = [piece for of_rank in case.plan.ranks for micro_batch in of_rank for piece in micro_batch.pieces]
    return {(len(piece.ring), piece.heads, piece.gathers) for piece in pieces if len(piece.ring) > 1}


def _drawn() -> list[Choice]:
    """Twenty without experts, twenty with."""
    choices = random.Random(0).sample(_choices(), len(_choices()))
    dense = [choice for choice in choices if CONFIGS[choice.model].moe is None]
    experts = [choice for choice in choices if CONFIGS[choice.model].moe is not None]
    return [choice for pair in zip(dense[:20], experts[:20], strict=True) for choice in pair]


@pytest.mark.parametrize("part", [0, 1, *(pytest.param(part, marks=pytest.mark.parity) for part in range(2, 5))])
def test_forty_layouts_drawn_from_all_equal_one_process(part: int) -> None:
    _check(_drawn()[part::5])


def _in_parts(choices: list[Choice]) -> list[list[Choice]]:
    return [choices[first : first + 8] for first in range(0, len(choices), 8)]


@pytest.mark.parity
@pytest.mark.parametrize("choices", _in_parts(_every_factorisation()), ids=len)
def test_every_factorisation_of_eight_ranks_equals_one_process(choices: list[Choice]) -> None:
    _check(choices)


@pytest.mark.parity
@pytest.mark.parametrize("choices", _in_parts(_every_pair()), ids=len)
def test_every_pair_of_choices_equals_one_process(choices: list[Choice]) -> None:
    _check(choices)
