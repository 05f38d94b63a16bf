"""The step guard: a step whose loss or gradient is not finite updates nothing, on any rank."""

import math

from evermesh.runtime.errors import TrainingDiverged
from evermesh.runtime.state import Progress


class StepGuard:
    """Decides from globally reduced values, so all ranks decide alike (the rule of Ling, arXiv 2503.05139, section 3.4.4,
    for values that are not finite). Its count is part of the run's progress and survives a restart."""

    def __init__(self, max_skipped_steps: int, progress: Progress) -> None:
        self.max_skipped_steps, self.progress = max_skipped_steps, progress

    def commit(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether the update of ``step`` may be made.

        Raises:
            TrainingDiverged: this is the last of ``max_skipped_steps`` bad steps in a row.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.progress.skipped_in_a_row = 0
            return True
        self.progress.skipped_in_a_row += 1
        in_a_row = self.progress.skipped_in_a_row
        if in_a_row >= self.max_skipped_steps:
            raise TrainingDiverged(
                f"the last {in_a_row} steps, up to step {step}, had a loss or gradient that is not finite "
                f"(now loss {loss}, gradient norm {grad_norm}). Lower train.optimizer.lr, look at the data of these steps "
                "in telemetry.jsonl, or raise train.max_skipped_steps."
            )
        return False
