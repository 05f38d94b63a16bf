"""The learning rate of every update of a run."""

import math

from evermesh.runtime.optimizer_config import ConstantSchedule, CosineSchedule, OptimizerConfig, Schedule, WsdSchedule


def learning_rate(config: OptimizerConfig, update: int, steps: int) -> float:
    """Rate of ``update`` (from 1) in a run of ``steps``: a straight warm-up to the peak, then what the schedule says.

    Update ``steps`` has the final rate.
    """
    if update <= config.warmup_steps:
        return config.lr * update / config.warmup_steps
    return config.lr * _ratio(config.schedule, update, config.warmup_steps, steps)


def _ratio(schedule: Schedule, update: int, warmup_steps: int, steps: int) -> float:
    """The rate over its peak, behind the warm-up."""
    if isinstance(schedule, ConstantSchedule):
        return 1.0
    if isinstance(schedule, WsdSchedule):
        decay_starts = max(warmup_steps, steps - math.ceil(schedule.decay_share * steps))
        return schedule.final_lr_ratio ** _share(update, decay_starts, steps)
    share, final = _share(update, warmup_steps, steps), schedule.final_lr_ratio
    remaining = 0.5 * (1 + math.cos(math.pi * share)) if isinstance(schedule, CosineSchedule) else 1 - share
    return final + (1 - final) * remaining


def _share(update: int, start: int, stop: int) -> float:
    """How far ``update`` is from ``start`` to ``stop``, 0 to 1."""
    return min(1.0, max(0, update - start) / max(1, stop - start))
