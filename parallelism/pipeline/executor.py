"""Runs one rank of a pipeline: its actions in order, with messages of the size of each micro-batch.

torch's own stages fix the shapes of the first step and pad every micro-batch to them; here every micro-batch has the
size that the batch plan gives it, also none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from evermesh.parallelism.pipeline.deferred import DeferredWeights, accumulate
from evermesh.parallelism.pipeline.links import Activations, Links, Mail
from evermesh.parallelism.pipeline.schedule import Action, PipelineSchedule


class Stage(Protocol):
    """Some consecutive layers of a model, with what they need to know of the micro-batches of the step."""

    def forward(self, micro_batch: int, x_tC: Tensor | None, /) -> Tensor:
        """Output [t, C] of the layers for one micro-batch, differentiable; of the last stage its loss, a scalar.

        Args:
            micro_batch: index in this rank's list.
            x_tC: output of the stage before, a leaf that requires grad; None for the first stage.
        """
        ...


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What the actions of one step left behind, besides the gradients of the parameters."""

    loss: Tensor
    """Sum of the losses of the micro-batches, a float64 scalar; zero on ranks without the last stage."""
    peak_activations: int
    """The most (stage, micro-batch) pairs whose activations were kept at once."""


class _Kept(NamedTuple):
    """What the backward pass of one micro-batch through one stage needs; not the output's values."""

    x_tC: Tensor | None
    output: GradientEdge
    grad: Tensor | None
    """Of the loss by itself; None: another stage sends the gradient of the output."""


class PipelineExecutor:
    """Runs steps on one rank of a pipeline.

    Args:
        schedule: of the pipeline.
        rank: this rank of it.
        links: this rank's links, open (``open_links``).
        deferred: what was applied to the model of the stages; None: "backward input" computes all gradients, and
            "backward weight" does nothing.
    """

    def __init__(
        self, schedule: PipelineSchedule, rank: int, links: Links, deferred: DeferredWeights | None = None
    ) -> None:
        wanted = {link for link in schedule.links() if rank in link}
        assert wanted == set(links), f"rank {rank} needs the links {sorted(wanted)} and has {sorted(links)}"
        self.schedule, self.rank, self.links, self.deferred = schedule, rank, links, deferred

    def run(self, stages: Mapping[int, Stage], activations: Activations) -> StepOutcome:
        """Forward and backward of all micro-batches of a step; adds to ``grad`` of the parameters, in place.

        Collective over the pipeline, and over whatever the stages communicate with: all in the order of
        ``schedule.actions``, the whole communication of a backward pass in its first part where it has two. Nothing is
        kept when it returns. A stage runs a micro-batch without tokens too, on an empty tensor.

        Args:
            stages: the stages of this rank, by index (``schedule.stages_of``), made for this step's micro-batches.
            activations: sizes of the micro-batches.
        """
        step = _Step(self, stages, activations, self.schedule)
        for action in self.schedule.actions(self.rank, len(activations.num_tokens)):
            step.run(action)
        step.mail.close()
        assert not step.kept
        return StepOutcome(step.loss, step.peak)

    @torch.no_grad()
    def evaluate(self, stages: Mapping[int, Stage], activations: Activations) -> Tensor:
        """Only forward; returns the sum of the losses, as ``StepOutcome.loss``. Arguments as for ``run``, as collective."""
        step = _Step(self, stages, activations, replace(self.schedule, forward_only=True))
        for action in step.schedule.actions(self.rank, len(activations.num_tokens)):
            step.output(action)
        step.mail.close()
        return step.loss


class _Step:
    """The state of one step."""

    def __init__(
        self,
        executor: PipelineExecutor,
        stages: Mapping[int, Stage],
        activations: Activations,
        schedule: PipelineSchedule,
    ) -> None:
        self.schedule, self.deferred, self.stages = schedule, executor.deferred, stages
        self.mail = Mail(schedule, executor.rank, activations, executor.links)
        self.kept: dict[tuple[int, int], Any] = {}
        """By stage and micro-batch: a ``_Kept`` until the (first part of the) backward pass, then notes of weights."""
        self.loss = torch.zeros((), dtype=torch.float64, device=activations.device)
        self.peak = 0

    def run(self, action: Action) -> None:
        """One action; messages are received before it and sent behind it."""
        key = action.stage, action.micro_batch
        if action.kind == "forward":
            self.kept[key] = self._forward(action)
            self.peak = max(self.peak, len(self.kept))
        elif action.kind == "backward":
            self._backward(action, self.kept.pop(key))
        elif action.kind == "backward input":
            self.kept[key] = self._backward_input(action, self.kept.pop(key))
        else:
            accumulate(self.kept.pop(key))

    def output(self, action: Action) -> tuple[Tensor | None, Tensor]:
        """Input and output of a forward pass, which was handed on."""
        received, sent = self.schedule.received(action), self.schedule.sent(action)
        x_tC = self.mail.receive(received) if received is not None else None
        if x_tC is not None and torch.is_grad_enabled():
            x_tC.requires_grad_()
        output = self.stages[action.stage].forward(action.micro_batch, x_tC)
        if sent is None:
            self.loss += output.detach()
        else:
            self.mail.send(sent, output.detach())
        return x_tC, output

    def _forward(self, action: Action) -> _Kept:
        x_tC, output = self.output(action)
        edge = get_gradient_edge(output)  # not the tensor: its values are free as soon as the next stage has them
        is_loss = action.stage == self.schedule.num_stages - 1
        return _Kept(x_tC, edge, torch.ones_like(output) if is_loss else None)

    def _backward(self, action: Action, kept: _Kept) -> None:
        received, sent = self.schedule.received(action), self.schedule.sent(action)
        grad = self.mail.receive(received) if received is not None else kept.grad
        torch.autograd.backward((kept.output,), (grad,))
        if sent is not None:
            assert kept.x_tC is not None
            grad_x = kept.x_tC.grad
            self.mail.send(sent, grad_x if grad_x is not None else torch.zeros_like(kept.x_tC))

    def _backward_input(self, action: Action, kept: _Kept) -> list[Any]:
        if self.deferred is None:
            self._backward(action, kept)
            return []
        with self.deferred.collecting() as notes:
            self._backward(action, kept)
        return notes


__all__ = ["Activations", "PipelineExecutor", "Stage", "StepOutcome"]
