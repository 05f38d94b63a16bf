"""When windows of nodes with clocks of their own were read, next to the truth, which the controller does not know."""

import random

import pytest

from evermesh.launcher.controller.watching.reading_times import ReadingTimes


@pytest.mark.parametrize("seed", range(20))
def test_the_truth_is_within_what_is_said_and_what_is_said_is_close_to_it(seed: int) -> None:
    draw = random.Random(seed)
    clocks_s = {f"node-{number}": draw.uniform(-1e6, 1e6) for number in range(4)}
    drift = {node: draw.uniform(-5e-5, 5e-5) for node in clocks_s}
    times, now_s = ReadingTimes(), 1000.0
    said = []
    for _ in range(200):
        read_s: dict[str, float] = {}
        for node, ahead_s in clocks_s.items():
            read_s[node] = now_s + draw.uniform(0, 0.3)
            on_its_way_s = 0.001 + draw.expovariate(1 / 0.02) + (draw.random() < 0.1) * draw.uniform(0, 0.2)
            local_s = read_s[node] * (1 + drift[node]) + ahead_s
            times.note(node, local_s - 0.002, local_s, read_s[node] + on_its_way_s)
        truth_s = max(read_s.values()) - min(read_s.values())
        said.append(times.apart_s() - truth_s)
        assert said[-1] >= 0
        now_s += 0.5
    assert max(said[8:]) < 0.15, "a window that was long on its way was not read late"


def test_before_windows_are_known_it_is_what_was_heard_and_the_longest_way() -> None:
    times = ReadingTimes()
    times.note("node-0", 5.0, 5.0, 100.0)
    assert times.apart_s() == 0, "one node has one clock"
    times.note("node-1", 77.0, 77.0, 100.4)
    assert times.apart_s() == pytest.approx(0.65)
