"""Errors of planned gradients against one process that runs every document alone with attention written out."""

from evermesh.parallelism import Layout, plan_batch
from tests.benchmarks.harness import Row, exact_row
from tests.runtime.test_gradients import COST, TOLERANCE, worst_error

LENGTHS = (1, 97, 40, 13, 2, 61, 29, 7)


def run() -> list[Row]:
    """The largest relative error of the loss and any parameter's gradient, for 1 to 5 ranks."""
    return [
        exact_row(
            f"largest relative error, {dtype}, {ranks} ranks",
            worst_error(plan_batch(LENGTHS, Layout(hdp=ranks, capacity=max(41, -(-97 // ranks))), COST), dtype),
            "relative",
            goal=tolerance,
        )
        for dtype, tolerance in TOLERANCE.items()
        for ranks in range(1, 6)
    ]
