"""Steps as ranks would report them."""

from typing import Any

from evermesh.runtime.telemetry import PlanSummary, StepReport


def step_report(step: int, step_s: float, **changes: Any) -> StepReport:
    """One that was trained on two workers."""
    values: dict[str, Any] = {
        "step": step,
        "steps": 100,
        "loss": 3.0 - 0.1 * step,
        "grad_norm": 0.5,
        "lr": 1e-3,
        "committed": True,
        "num_tokens": 100,
        "num_sequences": 4,
        "num_split": 0,
        "workers": 2,
        "step_s": step_s,
        "time_left_s": 50.0,
        "plan": PlanSummary({1: 4}, (2, 2), 0.9, 1.1, 1.0),
        "bytes_by_site": {},
        "batch": "x",
    }
    return StepReport(**values | changes)
