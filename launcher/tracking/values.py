"""What trackers are told of a step and of a run: names and numbers. Pure functions."""

from typing import Any

from evermesh.launcher.config import JobConfig
from evermesh.runtime.telemetry import StepReport


def values_of(report: StepReport) -> dict[str, float]:
    """The numbers of a step by name; times in seconds, losses in nats per token."""
    values: dict[str, float | None] = {
        "train/loss": report.loss,
        "train/held_out_loss": report.held_out_loss,
        "train/grad_norm": report.grad_norm,
        "train/learning_rate": report.lr,
        "train/skipped": float(not report.committed),
        "data/tokens": report.num_tokens,
        "data/steps_late": report.mean_steps_late,
        "data/sequences_waiting": report.num_waiting,
        "data/sequences_set_aside": report.num_set_aside,
        "speed/step_s": report.step_s,
        "speed/tokens_per_s": report.tokens_per_s,
        "speed/model_flops_per_s": report.model_flops / report.step_s if report.step_s > 0 else None,
        "speed/plan_wait_s": report.plan_wait_s,
        "speed/checkpoint_stop_s": report.checkpoint_stop_s,
        "speed/snapshot_stop_s": report.snapshot.stop_s,
        "plan/fill": report.plan.fill,
        "plan/makespan_over_bound": report.plan.ratio,
    }
    return {name: float(value) for name, value in values.items() if value is not None}


def settings_of(config: JobConfig) -> dict[str, str | int | float | bool]:
    """What a run was started with, flat: ``train.layout.tp`` and so on. Nothing that says where things lie."""
    train = config.train.model_dump(mode="json")
    data = train.pop("data")
    train.pop("checkpoint")  # both have addresses of stores, which may hold keys
    train["data"] = {name: value for name, value in data.items() if isinstance(value, int | float | bool)}
    told = {"workers": config.workers, "nodes": config.nodes, "train": train}
    return dict(_flat(told, ""))


def _flat(value: Any, name: str) -> list[tuple[str, str | int | float | bool]]:
    if isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _flat(inner, f"{name}.{key}" if name else str(key))]
    if value is None or isinstance(value, list):
        return [(name, str(value))] if value else []
    return [(name, value)]
