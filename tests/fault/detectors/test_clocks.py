"""Differences of clocks from collectives and from round trips: the interval always holds the truth."""

import numpy as np
import pytest

from evermesh.fault.detectors.clocks import bounds_of_collectives, bounds_of_round_trips, difference, estimate_offsets
from evermesh.fault.detectors.joining import join, slots_of
from evermesh.fault.detectors.matching import match
from evermesh.fault.synthetic import Clock, JobShape, generate

_BEGIN_NS = 1_000_000_000_000_000
_WINDOW = 60


def _clock(random: np.random.Generator) -> tuple[float, float]:
    """Offset, nanoseconds, and drift."""
    return float(random.uniform(-2e8, 2e8)), float(random.uniform(-300e-6, 300e-6))


def _stamp(true_ns: np.ndarray, clock: tuple[float, float]) -> np.ndarray:
    return np.round(true_ns + clock[0] + clock[1] * (true_ns - _BEGIN_NS)).astype(np.int64)


def _collectives(random: np.random.Generator, one: tuple[float, float], other: tuple[float, float]) -> list[np.ndarray]:
    """Stamps of two ranks, which come at different times and see the end a little late, at times very late."""
    begin = _BEGIN_NS + np.cumsum(random.exponential(50e6, _WINDOW))
    entered = [begin + random.exponential(2e6, _WINDOW) for _ in range(2)]
    over = np.maximum(*entered) + random.exponential(3e5, _WINDOW)
    ended = [over + random.exponential(5e4, _WINDOW) + (random.random(_WINDOW) < 0.1) * 5e6 for _ in range(2)]
    pairs = zip(entered, ended, (one, other), strict=True)
    return [_stamp(stamp, clock) for came, left, clock in pairs for stamp in (came, left)]


def test_the_interval_of_collectives_always_holds_the_truth() -> None:
    random = np.random.default_rng(1)
    errors_us, widths_us = [], []
    for _ in range(400):
        one, other = _clock(random), _clock(random)
        stamps = _collectives(random, one, other)
        at = float(stamps[3][_WINDOW // 2])
        true_ns = _BEGIN_NS + (at - _BEGIN_NS - other[0]) / (1 + other[1])
        truth = (one[0] - other[0]) + (one[1] - other[1]) * (true_ns - _BEGIN_NS)
        found = difference(bounds_of_collectives(*stamps), at)
        assert found is not None
        assert found.low_ns <= truth <= found.high_ns
        assert found.low_ns <= found.point_ns <= found.high_ns
        errors_us.append(abs(found.point_ns - truth) / 1e3)
        widths_us.append((found.high_ns - found.low_ns) / 1e3)
    assert np.percentile(errors_us, 95) < 50
    assert np.median(widths_us) < 1500


def test_the_interval_of_round_trips_always_holds_the_truth() -> None:
    random = np.random.default_rng(2)
    for _ in range(200):
        one, other = _clock(random), _clock(random)
        asked = _BEGIN_NS + np.cumsum(random.exponential(1e8, 30))
        got = asked + random.exponential(2e5, 30)
        answered = got + random.exponential(1e4, 30)
        heard = answered + random.exponential(2e6, 30)  # the way back is slower
        stamps = [_stamp(true, clock) for true, clock in ((asked, one), (got, other), (answered, other), (heard, one))]
        at = float(stamps[1][7])
        true_ns = _BEGIN_NS + (at - _BEGIN_NS - other[0]) / (1 + other[1])
        truth = (one[0] - other[0]) + (one[1] - other[1]) * (true_ns - _BEGIN_NS)
        found = difference(bounds_of_round_trips(*stamps), at)
        assert found is not None
        assert found.low_ns <= truth <= found.high_ns


def test_a_clock_that_was_set_is_noticed() -> None:
    random = np.random.default_rng(3)
    one, other = _clock(random), _clock(random)
    stamps = _collectives(random, one, other)
    for stamp in stamps[:2]:
        stamp[_WINDOW // 2 :] += 1_000_000_000
    assert difference(bounds_of_collectives(*stamps), float(stamps[3][0])) is None


@pytest.mark.parametrize("seed", range(4))
def test_offsets_of_nodes_are_found_from_their_records(seed: int) -> None:
    random = np.random.default_rng(seed)
    clocks = tuple(Clock(int(random.integers(-(10**8), 10**8)), float(random.uniform(-100, 100))) for _ in range(4))
    job = generate(JobShape(dp=4, tp=2, ranks_per_node=2, clocks=clocks), seed=seed)
    joined = join(job.traces)
    offsets = estimate_offsets(joined, match(joined, slots_of(joined)))
    assert offsets["node0"].offset_ns == 0
    assert set(offsets) == {f"node{node}" for node in range(4)}
    for node in range(4):
        for at_ns in (job.read_ns - 50_000_000, job.read_ns - 10_000_000):
            truth = job.true_offset_ns(node, at_ns) - job.true_offset_ns(0, at_ns)
            found = offsets[f"node{node}"]
            assert abs(found.offset_ns - truth) <= found.error_ns
