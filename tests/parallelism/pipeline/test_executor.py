"""Pipelines on real ranks against one process; their messages against a formula; what they keep against the order."""

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evermesh.parallelism.ledger import add_up
from evermesh.parallelism.pipeline import PipelineSchedule, peak_activations
from evermesh.parallelism.pipeline.deferred import DeferredWeights, accumulate
from evermesh.parallelism.pipeline.executor import PipelineExecutor
from evermesh.parallelism.traffic import pipeline_traffic
from tests.cluster import run_ranks
from tests.parallelism.pipeline.models import (
    WIDTH,
    Model,
    ModelStage,
    activations_of,
    batches,
    in_one_process,
    on_a_pipeline,
)

SIZES = ((3, 0, 7, 2, 5), (4, 4, 1, 0, 0, 9, 2, 6, 1, 3, 5), (0,), (), (2, 8))
"""Tokens of the micro-batches of each step."""

REST = ((2, False), (3, False), (3, True), (4, True))
"""Ranks and recomputation that only the wide matrix tries."""


def _schedules(ranks: int) -> tuple[PipelineSchedule, ...]:
    return (
        PipelineSchedule("gpipe", ranks),
        PipelineSchedule("1f1b", ranks),
        PipelineSchedule("interleaved-1f1b", ranks, 2),
        PipelineSchedule("interleaved-1f1b", ranks, 3),
        PipelineSchedule("zero-bubble", ranks),
        PipelineSchedule("zero-bubble", ranks, 2),
        PipelineSchedule("zero-bubble-v", ranks, 2),
    )


@functools.cache
def _expected(num_stages: int) -> list[tuple[float, dict[str, Tensor]]]:
    return in_one_process(num_stages, SIZES)


def _error(ours: Tensor, expected: Tensor) -> float:
    return ((ours - expected).abs().max() / expected.abs().max().clamp_min(1.0)).item()


@pytest.mark.parametrize(
    ("ranks", "recompute"), [(2, True), (4, False), *(pytest.param(*rest, marks=pytest.mark.parity) for rest in REST)]
)
def test_gradients_and_traffic_of_every_schedule(ranks: int, recompute: bool) -> None:
    schedules = _schedules(ranks)
    results = run_ranks(ranks, on_a_pipeline, schedules, SIZES, recompute)
    nodes = [2 * rank // ranks for rank in range(ranks)]
    for index, schedule in enumerate(schedules):
        for step, (loss, expected) in enumerate(_expected(schedule.num_stages)):
            of_ranks: list[Any] = [results[rank][index][step] for rank in range(ranks)]
            assert sum(result["loss"] for result in of_ranks) == pytest.approx(loss, rel=1e-12)
            for name, gradient in expected.items():  # every rank starts from one, the stages of the others add nothing
                ours = sum(result["grads"][name] - 1 for result in of_ranks) + 1
                assert _error(ours, gradient) <= 1e-12, f"{schedule} step {step} {name}"
            sent = add_up(traffic for result in of_ranks for traffic in result["sent"])
            assert sent == add_up(pipeline_traffic(SIZES[step], 8 * WIDTH, schedule, nodes))
            for rank, result in enumerate(of_ranks):
                assert result["peak"] == peak_activations(schedule.actions(rank, len(SIZES[step])))


def test_traffic_of_two_stages_counted_by_hand() -> None:
    (backward, forward) = add_up(pipeline_traffic((3, 0, 5), 10, PipelineSchedule("1f1b", 2), (0, 1)))
    assert (forward.call_site, forward.tier, forward.counts) == ("pipeline forward", "network", (80, 80, 2))
    assert (backward.call_site, backward.axis, backward.counts) == ("pipeline backward", "pp", (80, 80, 2))


class _Talking(torch.autograd.Function):
    """Stands for whatever communicates in both passes: writes down when it does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log: list[str], name: str) -> Tensor:
        ctx.log, ctx.name = log, name
        log.append(f"forward {name}")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.log.append(f"backward {ctx.name}")
        return grads[0], None, None


class _TalkingBlock(nn.Module):
    """A block of the model that talks between its layers, so also where weights lie on both sides."""

    def __init__(self, block: nn.Module, log: list[str]) -> None:
        super().__init__()
        self.block, self.log = block, log

    def forward(self, x: Tensor, name: str) -> Tensor:
        return self.block(_Talking.apply(self.block(x), self.log, name))


class _TalkingStage(ModelStage):
    def block(self, micro_batch: int) -> Callable[[Tensor], Tensor]:
        return functools.partial(self.model.blocks[self.stage], name=f"{self.stage} {micro_batch}")


@pytest.mark.parametrize("name", ["zero-bubble", "zero-bubble-v"])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_communicates_does_so_once_and_before_the_weights_are_left(name: Any, recompute: bool) -> None:
    schedule = PipelineSchedule(name, 1, 2)
    model, deferred, log = Model(2), DeferredWeights(), list[str]()
    for index, block in enumerate(list(model.blocks)):
        model.blocks[index] = _TalkingBlock(block, log)
    deferred.apply(model)
    step = batches(((3, 0, 2),))[0]
    stages = {stage: _TalkingStage(model, stage, step, recompute) for stage in range(2)}
    PipelineExecutor(schedule, 0, {}, deferred).run(stages, activations_of(step))
    passes = {"forward": ["forward"], "backward input": ["forward", "backward"] if recompute else ["backward"]}
    expected = [
        f"{talk} {action.stage} {action.micro_batch}"
        for action in schedule.actions(0, 3)
        for talk in passes.get(action.kind, [])
    ]
    assert log == expected


def test_weights_that_are_put_off_get_what_they_would_have_got_and_nothing_before() -> None:
    model, deferred = Model(1), DeferredWeights()
    step = batches(((5,),))[0]
    ModelStage(model, 0, step).forward(0, None).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    deferred.apply(model)
    with deferred.collecting() as notes:
        ModelStage(model, 0, step, recompute=True).forward(0, None).backward()
    late = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert late == {"blocks.0.up.weight", "blocks.0.down.weight", "head.weight"}
    accumulate(notes)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert _error(parameter.grad, expected[name]) <= 1e-12
    assert notes == []


def test_nothing_is_kept_after_a_step_and_outputs_are_free_before_their_backward_pass() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Watched(ModelStage):
        def forward(self, micro_batch: int, x_tC: Tensor | None, /) -> Tensor:
            nonlocal most
            output = super().forward(micro_batch, x_tC)
            most = max(most, sum(reference() is not None for reference in alive))
            alive.append(weakref.ref(output))
            return output

    schedule, model = PipelineSchedule("gpipe", 1), Model(1)
    step = batches(((3, 4, 2, 5),))[0]
    gc.disable()  # nothing may wait for the collector of circles
    try:
        PipelineExecutor(schedule, 0, {}).run({0: Watched(model, 0, step)}, activations_of(step))
        assert most == 0
        assert [reference() for reference in alive] == [None] * 4
    finally:
        gc.enable()
