"""What a micro-batch takes in one stage of a pipeline."""

from typing import NamedTuple

from evermesh.parallelism.batch_plan import MicroBatch
from evermesh.parallelism.pipeline.schedule import ActionKind


class StageSeconds(NamedTuple):
    """What one micro-batch takes in one stage."""

    forward: float
    backward_input: float
    """With the recomputation before it."""
    backward_weight: float

    def of(self, kind: ActionKind) -> float:
        """Seconds of an action."""
        return {
            "forward": self.forward,
            "backward": self.backward_input + self.backward_weight,
            "backward input": self.backward_input,
            "backward weight": self.backward_weight,
        }[kind]


def stage_seconds(seconds: float, micro_batch: MicroBatch) -> StageSeconds:
    """The parts of what a micro-batch takes in one stage, forward and backward together.

    One forward pass, one for the gradients of the input, one for those of the weights; and one more to recompute blocks.
    """
    recomputed = micro_batch.recompute == "block"
    one = seconds / (3 + recomputed)
    return StageSeconds(one, one * (1 + recomputed), one)
