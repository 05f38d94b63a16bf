"""The step guard: a bad step updates nothing, on any rank, and its samples are tried again later."""

import math
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from evermesh.runtime.data import Batch, SequenceRef
from evermesh.runtime.data.errors import SamplerMismatch
from evermesh.runtime.errors import TrainingDiverged
from evermesh.runtime.guard.config import GuardConfig
from evermesh.runtime.guard.retries import Group, RetryQueue, names_of
from evermesh.runtime.guard.spikes import Window
from evermesh.runtime.state import Progress

_Sequence = tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt]
"""The fields of a ``SequenceRef``."""


class _GroupState(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    due: NonNegativeInt
    tries: NonNegativeInt
    sequences: tuple[_Sequence, ...]


class GuardState(BaseModel):
    """What of the guard is in a checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: tuple[float, ...] = ()
    """Of the last accepted steps."""
    norms: tuple[float, ...] = ()
    groups: tuple[_GroupState, ...] = ()
    """That wait to be tried again."""
    set_aside: tuple[_Sequence, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a step."""

    fault: str | None = None
    """Why its update is not made; None: it is."""
    lr_scale: float = 1.0
    """What the learning rate of its update is multiplied by."""
    num_waiting: int = 0
    """Sequences that wait to be tried again, behind this step."""
    set_aside: tuple[SequenceRef, ...] = ()
    """Sequences that are not tried again any more, from this step on."""

    @property
    def commits(self) -> bool:
        """Whether the update is made."""
        return self.fault is None


class StepGuard:
    """Decides from globally reduced values, so all ranks decide alike without another collective (the rules of Ling, arXiv
    2503.05139, section 3.4.4). What it knows is part of the run's progress, and survives a restart on any layout.

    Args:
        config: the rules.
        max_skipped_steps: bad steps in a row at which the run ends.
        progress: keeps the state.
        seed: of the run.
        steps: of the whole run.
    """

    def __init__(self, config: GuardConfig, max_skipped_steps: int, progress: Progress, seed: int, steps: int) -> None:
        self.config, self.max_skipped_steps, self.progress = config, max_skipped_steps, progress
        self._window = Window(config.spikes)
        self.retries = RetryQueue(seed, steps, config.max_retries, config.retry_within)
        self._written: tuple[tuple[Group, ...], list[dict[str, Any]]] = ((), [])
        """The groups that wait, and the same as JSON values: they seldom change, and may be large."""

    def judge(self, step: int, loss: float, grad_norm: float, batch: Batch, suspicion: str | None = None) -> Verdict:
        """What becomes of ``step``, which trained ``batch``; a ``suspicion`` that all ranks share makes it a bad one.

        A spike is skipped ``lower_lr_after`` times in a row. Then it is no accident of a batch: updates are made with half
        the learning rate until values are as they were, or the window knows them.

        Raises:
            TrainingDiverged: this is the last of ``max_skipped_steps`` bad steps in a row.
        """
        progress, in_a_row = self.progress, self.progress.skipped_in_a_row
        lowers = self.config.lower_lr_after is not None and in_a_row >= self.config.lower_lr_after
        fault = suspicion or self._window.fault(loss, grad_norm)
        # values that stay high are those of the parameters, which a skipped step does not change
        is_believed = fault is not None and lowers and suspicion is None and math.isfinite(loss + grad_norm)
        if fault is None or is_believed:
            fault, progress.skipped_in_a_row = None, in_a_row if is_believed else 0
            self._window.accept(loss, grad_norm)
            self.retries.passed(step)
            gone: tuple[SequenceRef, ...] = ()
        else:
            progress.skipped_in_a_row += 1
            if progress.skipped_in_a_row >= self.max_skipped_steps:
                raise TrainingDiverged(self._diverged(step, fault))
            gone = self.retries.failed(step, batch)
        progress.guard = self._state()
        return Verdict(fault, 0.5 if lowers and fault is None else 1.0, self.retries.num_waiting, gone)

    def restore(self) -> None:
        """Go on from what ``progress`` says.

        Raises:
            SamplerMismatch: that is not the state of a guard.
        """
        try:
            state = GuardState.model_validate(self.progress.guard)
        except ValidationError as error:
            raise SamplerMismatch(
                f"not the state of a step guard: {error.errors()[0]}. Resume from another."
            ) from error
        policy = self._window.policy
        if policy is not None:
            self._window.losses = list(state.losses[-policy.window :])
            self._window.norms = list(state.norms[-policy.window :])
        self.retries.groups = tuple(
            Group(group.due, group.tries, tuple(SequenceRef(*row) for row in group.sequences)) for group in state.groups
        )
        self.retries.set_aside = tuple(SequenceRef(*row) for row in state.set_aside)

    def unfinished(self) -> tuple[str, dict[str, Any]] | None:
        """What the run has not trained on, for a person and for a program; None: nothing."""
        waiting = [sequence for group in self.retries.groups for sequence in group.sequences]
        parts = [("set aside", self.retries.set_aside), ("waiting to be tried again", waiting)]
        if not any(sequences for _, sequences in parts):
            return None
        text = "; ".join(f"{what}: {names_of(sequences)}" for what, sequences in parts if sequences)
        fields = {what.split()[0]: [sequence.identity for sequence in sequences] for what, sequences in parts}
        return text, fields

    def _state(self) -> dict[str, Any]:
        """As JSON values, of which none is changed later."""
        groups = self.retries.groups
        if groups is not self._written[0]:
            self._written = (
                groups,
                [
                    {
                        "due": group.due,
                        "tries": group.tries,
                        "sequences": [_row(sequence) for sequence in group.sequences],
                    }
                    for group in groups
                ],
            )
        return {
            "losses": self._window.losses,
            "norms": self._window.norms,
            "groups": self._written[1],
            "set_aside": [_row(sequence) for sequence in self.retries.set_aside],
        }

    def _diverged(self, step: int, fault: str) -> str:
        return (
            f"the last {self.progress.skipped_in_a_row} steps, up to step {step}, were bad: now {fault}. Lower "
            "train.optimizer.lr, look at the data of these steps in telemetry.jsonl, or raise train.max_skipped_steps."
        )


def _row(sequence: SequenceRef) -> list[int]:
    return [sequence.source, sequence.document, sequence.start, sequence.stop, sequence.document_length]


__all__ = ["GuardState", "StepGuard", "Verdict"]
