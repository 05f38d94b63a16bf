"""What offloading costs a micro-batch: against a scan over fractions, ByteScale's measurements, and its own laws."""

import random

import numpy as np
import pytest
from pydantic import ValidationError

from evermesh.parallelism import CostModel, Layout, MicroBatch, Piece
from evermesh.parallelism.cost import Sharing, Work
from evermesh.parallelism.planner.costs import Coefficients, offloaded_s, shared_s
from evermesh.parallelism.simulator import micro_batch_s

FRACTIONS = np.linspace(0.0, 1.0, 401)


def any_cost(dice: random.Random) -> CostModel:
    """Coefficients of any proportion, some of them zero."""

    def sometimes(coefficient: float) -> float:
        return dice.choice((0.0, coefficient, coefficient * 10.0 ** dice.uniform(-1.5, 1.5)))

    again_s = sometimes(1e-6)
    return CostModel(
        token_s=3e-6 * dice.uniform(0.3, 3.0),
        pair_s=sometimes(1e-9),
        recompute_token_s=again_s,
        recompute_pair_s=sometimes(1e-10),
        offload_saves_token_s=again_s * dice.choice((0.0, 1.0, dice.random())),
        host_token_s=sometimes(5e-7),
        host_products_token_s=sometimes(1e-6),
        tile=dice.choice((1, 128)),
    )


def any_work(dice: random.Random) -> Work:
    tokens = float(dice.choice((0, 1, dice.randint(1, 100_000))))
    return Work(tokens, tokens * dice.choice((1.0, dice.uniform(1.0, 50_000.0))))


def test_the_best_fraction_is_that_of_a_scan() -> None:
    dice, inside = random.Random(0), 0
    for _ in range(600):
        cost, work = any_cost(dice), any_work(dice)
        best = cost.best_offload(work)
        scanned = [cost.offload_s(work, fraction) for fraction in FRACTIONS]
        least = cost.offload_s(work, best)
        scale = sum(cost.passes_s(work))
        assert 0.0 <= best <= 1.0
        assert least <= min(scanned) + 1e-12 * scale
        # between two points of the scan it falls no further than the steepest slope lets it
        slope = (2 * cost.host_products_token_s + cost.offload_saves_token_s) * work.tokens
        assert least >= min(scanned) - slope / 400 - 1e-12 * scale
        inside += 0.0 < best < 1.0
    assert inside > 15


@pytest.mark.parametrize("offload", ["auto", 0.0, 0.3, 1.0])
def test_planes_are_the_formula(offload: float | str) -> None:
    """The planner's closed form, by duality, against the sum of what is late and what is saved."""
    dice = random.Random(1)
    for _ in range(2000):
        cost, work = any_cost(dice), any_work(dice)
        layout = Layout.model_validate({"activations": "offload", "offload": offload})
        fraction = cost.best_offload(work) if layout.offload == "auto" else layout.offload
        found = offloaded_s(Coefficients.of(cost, layout, 1.0), *work)
        assert found == pytest.approx(cost.offload_s(work, fraction), rel=1e-9, abs=1e-9 * sum(cost.passes_s(work)))


def test_documents_together_never_take_longer_than_apart_nor_less_than_one_of_them() -> None:
    dice, gains = random.Random(2), 0
    for _ in range(2000):
        cost, works = any_cost(dice), [any_work(dice) for _ in range(2)]
        layout = Layout(activations="offload", offload="auto")
        costs, together = Coefficients.of(cost, layout, 1.0), CostModel.together(works)
        apart = sum(offloaded_s(costs, *work) for work in works)
        shared = offloaded_s(costs, *together)
        assert shared <= apart + 1e-12 * sum(cost.passes_s(together))
        gains += shared < apart * (1 - 1e-6 * np.sign(apart))
        assert sum(cost.passes_s(together)) + shared >= (
            sum(cost.passes_s(works[0])) + offloaded_s(costs, *works[0])
        ) * (1 - 1e-12)
    assert gains > 50


def test_a_document_with_much_attention_moves_more() -> None:
    cost = CostModel(
        token_s=3e-6, pair_s=3e-10, recompute_token_s=1e-6, offload_saves_token_s=8e-7, host_products_token_s=2e-6
    )
    fractions = [cost.best_offload(cost.work(length, Sharing())) for length in (100, 4000, 8000, 16_000, 64_000)]
    assert fractions == sorted(fractions)
    assert fractions[0] == pytest.approx(0.5, abs=0.01)
    assert fractions[-1] == 1.0


def test_a_piece_alone_in_its_micro_batch_takes_what_the_simulator_says() -> None:
    dice = random.Random(3)
    for _ in range(300):
        cost, ring = any_cost(dice), dice.randint(1, 8)
        length = 2 * ring * dice.randint(1, 2000)
        layout = Layout(activations="offload", offload="auto")
        members, share = tuple(range(ring)), length // ring
        piece = Piece(0, ((0, share // 2), (length - share + share // 2, length)), members)
        fraction = cost.best_offload(cost.work(length, Sharing(ring)))
        expected = micro_batch_s(MicroBatch((piece,), "block", fraction), (length,), cost)
        found = shared_s(Coefficients.of(cost, layout, 1.0), length, ring, 1, False, False, True)
        assert found == pytest.approx(expected, rel=1e-9)


def test_what_keeps_its_activations_never_offloads() -> None:
    cost = CostModel(token_s=1.0, pair_s=0.0, host_token_s=100.0)
    piece = Piece(0, ((0, 10),), (0,))
    assert micro_batch_s(MicroBatch((piece,)), (10,), cost) == 10.0
    assert micro_batch_s(MicroBatch((piece,), "block"), (10,), cost) > 1000.0


_FIGURE_21 = {0.5: 5.08, 0.6: 5.38, 0.8: 5.93, 1.0: 6.49}
"""Seconds by fraction, ByteScale (arXiv 2502.21231), figure 21, 64K tokens; 5.08 where nothing is offloaded."""
_NORMAL, _RECOMPUTED = 5.08, 6.70


def test_figure_21_of_bytescale_follows_from_three_of_its_six_times() -> None:
    """There what is not offloaded stays on the device: nothing is computed again, so nothing is saved.

    One forward pass is what full recomputation adds; what all copies take is the slope of the last two points.
    """
    tokens, forward = 65_536.0, _RECOMPUTED - _NORMAL
    copies = (_FIGURE_21[1.0] - _FIGURE_21[0.8]) / 0.2
    cost = CostModel(token_s=3 * forward / tokens, pair_s=0.0, host_products_token_s=copies / tokens)
    added = {fraction: cost.offload_s(Work(tokens, 0.0), fraction) for fraction in _FIGURE_21}
    assert added[0.5] == 0.0
    for fraction, seconds in _FIGURE_21.items():
        assert _NORMAL + added[fraction] == pytest.approx(seconds, rel=0.05)
    assert 0.2 < added[1.0] / _NORMAL < 0.28  # published: 0.28


def test_more_saved_than_is_repeated_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"offload_saves_token_s 2\.0 is more than recompute_token_s 1\.0"):
        CostModel(token_s=1.0, pair_s=0.0, recompute_token_s=1.0, offload_saves_token_s=2.0)
