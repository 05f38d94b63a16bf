"""The compiled cost formulas and those of the cost model are one."""

import random

from evermesh.parallelism import CostModel, Layout
from evermesh.parallelism.cost import Sharing
from evermesh.parallelism.planner.costs import Coefficients, best_sharing, shared_s


def random_cost(draw: random.Random) -> CostModel:
    return CostModel(
        token_s=draw.random(),
        pair_s=draw.random() * 1e-3,
        piece_s=draw.random(),
        tile=draw.choice([1, 128]),
        ring_step_s=draw.random() * 0.1,
        ring_token_s=draw.random() * 5,
        network_token_s=draw.choice([None, 5 + draw.random() * 9]),
        head_token_s=draw.random(),
        recompute_token_s=draw.random(),
        recompute_pair_s=draw.random() * 1e-3,
    )


def test_both_give_the_same_seconds_bit_for_bit() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        cost = random_cost(draw)
        heads, length = draw.choice([1, 2, 4]), draw.randint(1, 100_000)
        ring, gathers = heads * draw.randint(1, 9), draw.random() < 0.3
        crosses_nodes, recomputed = draw.random() < 0.5, draw.random() < 0.5
        found = shared_s(Coefficients.of(cost, Layout(), 10.0), length, ring, heads, gathers, crosses_nodes, recomputed)
        assert found == cost.shared_s(length, Sharing(ring, heads, gathers, crosses_nodes), recomputed=recomputed)


def test_the_cheapest_sharing_is_never_beaten_by_another_that_is_allowed() -> None:
    draw = random.Random(1)
    for _ in range(300):
        cost, length, ring = random_cost(draw), draw.randint(1, 100_000), draw.randint(2, 16)
        layout = Layout(ulysses=draw.choice([1, 4]), gathers_keys=draw.random() < 0.5)
        seconds, heads, gathers = best_sharing(Coefficients.of(cost, layout, 10.0), length, ring, 8, True, False)
        assert seconds == cost.shared_s(length, Sharing(ring, heads, gathers, True))
        others = [h for h in range(1, layout.ulysses + 1) if ring % h == 0 and 8 % h == 0]
        ways = [(h, g) for h in others for g in (False, True) if layout.gathers_keys or not g]
        assert seconds == min(cost.shared_s(length, Sharing(ring, h, g, True)) for h, g in ways if not g or h < ring)
