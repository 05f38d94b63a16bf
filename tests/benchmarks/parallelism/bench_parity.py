"""Errors of planned gradients against one process that runs every document alone with attention written out."""

from evermesh.parallelism import BatchPlan, Layout, plan_batch
from tests.benchmarks.harness import Row, exact_row
from tests.runtime.parity import COST, MANY_HEADS, TOLERANCE, worst_error

LENGTHS = (1, 97, 40, 13, 2, 61, 29, 7)
LAYOUTS = ((1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (1, 2), (2, 2), (3, 2), (1, 4), (2, 4))


def run() -> list[Row]:
    """The largest relative error of the loss and any parameter's gradient, for several layouts."""
    return [
        exact_row(
            f"largest relative error, {dtype}, hdp {hdp}" + (f" x tp {tp}" if tp > 1 else ""),
            worst_error(_plan(hdp), dtype, MANY_HEADS, tp),
            "relative",
            goal=tolerance,
        )
        for dtype, tolerance in TOLERANCE.items()
        for hdp, tp in LAYOUTS
    ]


def _plan(hdp: int) -> BatchPlan:
    return plan_batch(LENGTHS, Layout(hdp=hdp, capacity=max(41, -(-97 // hdp))), COST)
