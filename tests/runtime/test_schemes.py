"""Training runs whose planner chooses schemes of attention: the losses of one worker, and the ledger of the formula."""

import functools
from pathlib import Path
from typing import Any

import pytest

from evermesh.parallelism import BatchPlan, CostModel, Layout, LayoutDoesNotFit
from evermesh.runtime.layout import check_model
from tests.runtime.parity import MANY_HEADS
from tests.runtime.test_traffic import SHARED, _checked, _config

MODELS: dict[str, dict[str, Any]] = {
    "window": {"sliding_window": 50},
    "tied": {"tied_embeddings": True},
    "experts": {"moe": SHARED},
}
BASE = CostModel(token_s=1e-5, pair_s=1e-7)
CHEAPEST = {
    "heads": BASE.model_copy(update={"ring_token_s": 1e-3}),
    "gathering": BASE.model_copy(update={"ring_step_s": 1e-3}),
}
ZERO_3 = {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"}


def _schemes(plan: BatchPlan) -> set[tuple[int, int, bool]]:
    """Ring size, heads and gathering of the rings of a plan."""
    pieces = [piece for of_rank in plan.ranks for micro_batch in of_rank for piece in micro_batch.pieces]
    return {(len(piece.ring), piece.heads, piece.gathers) for piece in pieces if len(piece.ring) > 1}


def _model(name: str) -> dict[str, Any]:
    return {"layers": 4, "heads": 8, "kv_heads": 4} | MODELS[name]


@functools.cache
def _losses(corpus: Path, model: str) -> list[float]:
    """Of one worker."""
    return [report.loss for _, report in _checked(_config(corpus, "float64", _model(model), hdp=1))]


@pytest.mark.parametrize(
    ("model", "cheapest", "layout", "scheme"),
    [
        ("window", "heads", {"hdp": 4, "ulysses": 8}, (4, 4, False)),
        ("window", "gathering", {"hdp": 4, "gathers_keys": True, "activations": "recompute"}, (4, 1, True)),
        (
            "window",
            "heads",
            {"hdp": 4, "ulysses": 2, "activations": ["offload", "keep", "recompute", "offload"], "offload": 0.5},
            (4, 2, False),
        ),
        pytest.param(
            "experts",
            "heads",
            {"hdp": 4, "ep": 2, "ulysses": 4, "sharding": ZERO_3},
            (4, 4, False),
            marks=pytest.mark.parity,
        ),
        pytest.param(
            "tied",
            "heads",
            {"hdp": 2, "pp": 2, "tp": 2, "ulysses": 4, "schedule": "zero-bubble"},
            (2, 2, False),
            marks=pytest.mark.parity,
        ),
        pytest.param(
            "window",
            "heads",
            {"hdp": 4, "tp": 2, "ulysses": 4, "tp_chunks": 2, "activations": "recompute"},
            (4, 4, False),
            marks=pytest.mark.parity,
        ),
        pytest.param(
            "experts",
            "gathering",
            {"hdp": 4, "pp": 2, "etp": 2, "gathers_keys": True, "activations": "offload"},
            (4, 1, True),
            marks=pytest.mark.parity,
        ),
    ],
)
def test_a_run_has_the_losses_of_one_worker_and_the_ledger_of_the_formula(
    model: str, cheapest: str, layout: dict[str, Any], scheme: tuple[int, int, bool], odd_corpus: Path
) -> None:
    config = _config(odd_corpus, "float64", _model(model), **layout).model_copy(update={"cost": CHEAPEST[cheapest]})
    steps = list(_checked(config, ranks_per_node=2))
    assert scheme in set().union(*(_schemes(plan) for plan, _ in steps))
    assert [report.loss for _, report in steps] == pytest.approx(_losses(odd_corpus, model), rel=1e-9)


def test_a_model_whose_heads_cannot_be_divided_is_refused() -> None:
    check_model(Layout(hdp=4, ulysses=8, gathers_keys=True), MANY_HEADS)
    with pytest.raises(LayoutDoesNotFit, match=r"Set layout\.ulysses to 1 or 2 or 4") as error:
        check_model(Layout(hdp=4, tp=2, ulysses=8), MANY_HEADS)
    assert error.value.axis == "ulysses"
