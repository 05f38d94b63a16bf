"""What a spike is: far above the last accepted steps, never below, never for a flat loss."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from evermesh.runtime.config import TrainConfig
from evermesh.runtime.guard import GuardConfig, SpikePolicy
from evermesh.runtime.guard.spikes import NORMAL, Window, limit_of

POLICY = SpikePolicy(window=8, armed_after=8)


def full(values: list[float], policy: SpikePolicy | None = POLICY) -> Window:
    window = Window(policy)
    for value in values:
        window.accept(value, 1.0)
    return window


def _median(values: list[float]) -> float:
    """By definition: as many values are below it as above."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=20), st.floats(0.1, 20), st.floats(0, 1))
def test_limit_is_median_and_deviations(values: list[float], deviations: float, floor: float) -> None:
    median = _median(values)
    spread = 1.4826 * _median([abs(value - median) for value in values])
    assert limit_of(values, deviations, floor) == median + deviations * max(spread, floor * median)


def test_mad_times_1_4826_is_the_standard_deviation_of_a_normal_distribution() -> None:
    assert pytest.approx(1 / statistics.NormalDist().inv_cdf(0.75), abs=1e-4) == NORMAL


def test_a_loss_far_above_is_a_spike_and_one_far_below_is_none() -> None:
    window = full([2.0, 2.1, 1.9, 2.0, 2.05, 1.95, 2.1, 1.9])
    limit = limit_of(window.losses, POLICY.loss_deviations, POLICY.loss_floor)
    assert 2.2 < limit < 3
    assert window.fault(limit, 1.0) is None
    assert window.fault(math.nextafter(limit, math.inf), 1.0) is not None
    assert window.fault(0.0, 0.0) is None
    assert "gradient norm 10000 is above 4" in (window.fault(2.0, 1e4) or "")


def test_a_flat_loss_trips_nothing_within_its_floor() -> None:
    window = full([2.0] * 8)
    assert window.fault(2.0 * (1 + 6 * 0.02) - 1e-9, 1.0) is None
    assert window.fault(2.0 * (1 + 6 * 0.02) + 1e-9, 1.0) is not None


def test_it_is_armed_after_accepted_steps_and_forgets_the_oldest() -> None:
    window = full([2.0] * 7)
    assert window.fault(1e9, 1e9) is None
    window.accept(2.0, 1.0)
    assert window.fault(1e9, 1.0) is not None
    for _ in range(8):
        window.accept(5.0, 1.0)
    assert window.losses == [5.0] * 8
    assert window.fault(5.1, 1.0) is None


@pytest.mark.parametrize("policy", [None, POLICY])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_bad_whatever_is_configured(value: float, policy: SpikePolicy | None) -> None:
    window = Window(policy)
    assert "not finite" in (window.fault(value, 1.0) or "")
    assert "not finite" in (window.fault(1.0, value) or "")
    assert window.fault(1.0, 1.0) is None


def test_policies_are_switched_by_a_word_and_a_window_must_arm() -> None:
    assert GuardConfig.model_validate({"spikes": False}).spikes is None
    assert GuardConfig.model_validate({"spikes": "on", "probe": True, "replicas": "off"}).probe is not None
    with pytest.raises(ValidationError, match=r"only 8 accepted steps are looked back at\. Set window to 9"):
        SpikePolicy(window=8, armed_after=9)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"guard": {"probe": True}, "calibrate": True}, "calibrate is on, and would measure the probe"),
        ({"guard": {"probe": True}, "layout": {"activations": "offload"}}, "layout.activations offloads"),
        ({"guard": {"replicas": True}, "layout": {"sharding": {"kind": "deepspeed"}}}, "sharding is deepspeed"),
    ],
)
def test_checks_that_a_layout_cannot_have_are_refused(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        TrainConfig.model_validate({"data": {"sources": [{"kind": "stdlib"}]}} | values)
