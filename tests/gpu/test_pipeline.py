"""Stages on a GPU, where autograd runs backward passes on a thread of its own."""

import pytest
import torch

from evermesh.parallelism.pipeline import PipelineSchedule, ScheduleName
from evermesh.parallelism.pipeline.deferred import DeferredWeights
from evermesh.parallelism.pipeline.executor import PipelineExecutor
from evermesh.parallelism.pipeline.links import Activations
from tests.parallelism.pipeline.models import WIDTH, Model, ModelStage, batches, gradients, in_one_process

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `make gpu` on a machine with one"),
]


@pytest.mark.parametrize("name", ["zero-bubble", "zero-bubble-v", "interleaved-1f1b"])
@pytest.mark.parametrize("recompute", [False, True])
def test_stages_of_one_rank_on_a_gpu_equal_one_process(name: ScheduleName, recompute: bool) -> None:
    schedule, sizes = PipelineSchedule(name, 1, 2), ((5, 0, 300, 17),)
    ((loss, expected),) = in_one_process(2, sizes)
    model, deferred, device = Model(2).cuda(), DeferredWeights(), torch.device("cuda")
    deferred.apply(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    step = [tokens.cuda() for tokens in batches(sizes)[0]]
    stages = {stage: ModelStage(model, stage, step, recompute) for stage in range(2)}
    activations = Activations(sizes[0], WIDTH, torch.float64, device)
    executor = PipelineExecutor(schedule, 0, {}, deferred if schedule.splits_backward else None)
    assert executor.run(stages, activations).loss.item() == pytest.approx(loss, rel=1e-12)
    for parameter_name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient.cpu(), expected[parameter_name], rtol=1e-10, atol=1e-10)
