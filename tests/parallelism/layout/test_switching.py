"""Advice to switch: only where it pays off, for long enough, and with its reason."""

from collections.abc import Sequence

import pytest

from evermesh.parallelism import Layout
from evermesh.parallelism.layout.device import DEVICES
from evermesh.parallelism.layout.options import SearchOptions
from evermesh.parallelism.layout.policy import SwitchingPolicy
from evermesh.parallelism.layout.search import search_layouts
from evermesh.parallelism.layout.sizes import num_parameters
from evermesh.parallelism.layout.switching import (
    Advice,
    LayoutAdvisor,
    Option,
    SearchedOptions,
    decide,
    move_s,
)
from tests.parallelism.layout.shapes import LLAMA3_8B

HERE, THERE = Layout(hdp=8), Layout(hdp=4, tp=2)
POLICY = SwitchingPolicy(window=2, in_sight=100, least_gain=0.05, patience=2, restart_s=10.0)


@pytest.mark.parametrize(
    ("step_s", "move_s", "switches", "reason"),
    [
        (8.0, 50.0, True, "100 batches save 140 s"),
        (9.6, 0.0, False, "below 5% is no reason"),
        (8.0, 195.0, False, "do not pay that back"),
        (12.0, 0.0, False, "below 5%"),
    ],
)
def test_a_switch_pays_for_the_state_that_it_moves(step_s: float, move_s: float, switches: bool, reason: str) -> None:
    advice = decide(Option(HERE, 10.0, 0.0), [Option(THERE, step_s, move_s)], POLICY)
    assert advice.switches == switches
    assert advice.layout == (THERE if switches else HERE)
    assert advice.saves_s == pytest.approx((10.0 - step_s) * 100 - move_s - 10.0)
    assert reason in advice.reason


def test_without_others_everything_stays() -> None:
    assert decide(Option(HERE, 1.0, 0.0), [], POLICY).layout == HERE


def _observed(advisor: LayoutAdvisor, batches: Sequence[Sequence[int]]) -> list[Advice | None]:
    return [advisor.observe(batch) for batch in batches]


def _by_longest(batches: Sequence[Sequence[int]]) -> tuple[Option, Sequence[Option]]:
    """The other layout is better for long sequences."""
    is_long = max(map(max, batches)) > 1000
    return Option(HERE, 10.0, 0.0), [Option(THERE, 5.0 if is_long else 20.0, 1.0)]


def test_advice_waits_for_enough_windows_and_is_given_once() -> None:
    short, long = [[100, 200]] * 2, [[5000, 10]] * 2
    advisor = LayoutAdvisor(_by_longest, POLICY)
    assert _observed(advisor, short + long) == [None] * 4
    *before, advice = _observed(advisor, long)
    assert before == [None]
    assert advice is not None
    assert advice.switches
    assert _observed(advisor, long * 3) == [None] * 6
    assert _observed(advisor, short + long) == [None] * 4  # it counts anew
    assert _observed(advisor, long)[-1] is not None


def test_one_batch_with_an_outlier_is_no_reason() -> None:
    advisor = LayoutAdvisor(_by_longest, POLICY)
    assert _observed(advisor, [[100], [5000], [100], [100], [5000], [100], [100], [100]]) == [None] * 8


def test_a_layout_made_for_short_sequences_is_advised_against_when_they_get_long() -> None:
    topology = DEVICES["h100"].topology(4, 8)
    short, long = [[1000] * 2000] * 2, [[250_000] * 8] * 2
    options = SearchOptions(planned=0)
    current = search_layouts(LLAMA3_8B, topology, short, options)[0].layout
    policy = SwitchingPolicy(window=2, patience=1, in_sight=10_000)
    advisor = LayoutAdvisor(SearchedOptions(current, LLAMA3_8B, topology, options), policy)
    assert _observed(advisor, short) == [None, None]
    advice = _observed(advisor, long)[-1]
    print(f"\n{current}\n{advice}")
    assert advice is not None
    assert advice.layout != current
    now, others = advisor.options(long)
    assert any(option.layout == advice.layout and option.step_s < now.step_s for option in others)


def test_moving_everything_takes_the_bytes_of_a_rank_over_its_share_of_the_network() -> None:
    device, layout = DEVICES["h100"], Layout(hdp=16)
    seconds = move_s(LLAMA3_8B, layout, device.topology(2, 8), SearchOptions(device=device))
    received = num_parameters(LLAMA3_8B) * (2 + 12 / 16)
    assert seconds == pytest.approx(received / device.network_bytes_per_s, rel=1e-6)
