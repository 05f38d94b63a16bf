"""Learning rates of whole runs against their closed forms, and the choice of an optimizer in a configuration."""

import math
from typing import Any

import pytest

from evermesh.runtime import AdamWConfig
from evermesh.runtime.schedule import learning_rate

STEPS, WARMUP, PEAK = 20, 4, 0.5
DATA = {"sources": [{"kind": "corpus", "path": "nowhere"}]}


def _rates(schedule: dict[str, Any]) -> list[float]:
    config = AdamWConfig.model_validate({"lr": PEAK, "warmup_steps": WARMUP, "schedule": schedule})
    return [learning_rate(config, update, STEPS) for update in range(1, STEPS + 1)]


def _x(update: int) -> float:
    return (update - WARMUP) / (STEPS - WARMUP)


@pytest.mark.parametrize(
    ("schedule", "ratio"),
    [
        ({"kind": "constant"}, lambda u: 1.0),
        ({"kind": "linear"}, lambda u: 1 - _x(u)),
        ({"kind": "linear", "final_lr_ratio": 0.2}, lambda u: 1 - 0.8 * _x(u)),
        ({"kind": "cosine", "final_lr_ratio": 0.2}, lambda u: 0.6 + 0.4 * math.cos(math.pi * _x(u))),
        ({}, lambda u: 0.55 + 0.45 * math.cos(math.pi * _x(u))),
        ({"kind": "wsd"}, lambda u: {19: 0.1**0.5, 20: 0.1}.get(u, 1.0)),
        # halves every four updates, from update 12 on
        ({"kind": "wsd", "decay_share": 0.4, "final_lr_ratio": 0.25}, lambda u: 0.5 ** (max(0, u - 12) / 4)),
        # the decay would begin before the warm-up ends
        ({"kind": "wsd", "decay_share": 1.0, "final_lr_ratio": 0.5}, lambda u: 0.5 ** _x(u)),
    ],
)
def test_rates_warm_up_in_a_line_and_then_follow_the_closed_form(schedule: dict[str, Any], ratio: Any) -> None:
    expected = [PEAK * (u / WARMUP if u <= WARMUP else ratio(u)) for u in range(1, STEPS + 1)]
    assert _rates(schedule) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_a_longer_wsd_run_shares_the_rates_before_the_decay_with_a_shorter_one() -> None:
    config = AdamWConfig.model_validate({"warmup_steps": WARMUP, "schedule": {"kind": "wsd"}})
    short, long = ([learning_rate(config, update, steps) for update in range(1, 91)] for steps in (100, 200))
    assert short == long


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_a_run_that_is_all_warm_up_never_leaves_it(kind: str) -> None:
    config = AdamWConfig.model_validate({"lr": PEAK, "warmup_steps": 8, "schedule": {"kind": kind}})
    assert [learning_rate(config, update, 8) for update in range(1, 9)] == [PEAK * u / 8 for u in range(1, 9)]
