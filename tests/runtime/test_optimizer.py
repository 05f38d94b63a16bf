"""The sharded optimizer against torch's on the whole model, and its map of who owns what."""

import copy

import pytest
import torch
import torch.distributed as dist

from evermesh.checkpoint.tensors import local_tensors
from evermesh.parallelism import Communicator
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.tensor.apply import apply_tensor_parallel
from evermesh.runtime.flat import HeldSet
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.sharding import DECODER_SHARDING
from evermesh.runtime.optimizer import ShardedAdamW, shard_map
from evermesh.runtime.optimizer_config import AdamWConfig
from evermesh.runtime.parameter_set import Owners, ParameterSet, Sharers
from tests.cluster import run_ranks

MODEL = ModelConfig(hidden=16, layers=1, heads=2, kv_heads=1, ffn=20)
CONFIG = AdamWConfig(lr=0.01, weight_decay=0.3)


def _model() -> Decoder:
    model = Decoder(MODEL, 37)
    model.initialize(2)
    return model.double()


def _gradients(step: int, model: Decoder) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, dtype=p.dtype, generator=generator) for name, p in model.named_parameters()}


def _stepped(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    model = _model()
    optimizer = ShardedAdamW([ParameterSet.whole(model, Communicator(dist.group.WORLD))], CONFIG)
    for step in range(3):
        for name, gradient in _gradients(step, model).items():
            model.get_parameter(name).grad.copy_(gradient)  # type: ignore[union-attr]
        optimizer.step(lr=0.01 * (step + 1), gradient_scale=0.5)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("ranks", [1, 3])
def test_sharded_updates_equal_torch_adamw_on_the_whole_model(ranks: int) -> None:
    model = _model()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    whole = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": CONFIG.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=CONFIG.betas,
        eps=CONFIG.eps,
    )
    for step in range(3):
        for name, gradient in _gradients(step, model).items():
            model.get_parameter(name).grad = 0.5 * gradient
        for group in whole.param_groups:
            group["lr"] = 0.01 * (step + 1)
        whole.step()
    for parameters in run_ranks(ranks, _stepped):
        for name, parameter in model.named_parameters():
            assert torch.allclose(parameters[name], parameter, rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize("ranks", [1, 2, 7, 1024])
def test_map_of_any_number_of_ranks_covers_every_tensor_once(ranks: int) -> None:
    parameters = ParameterSet.whole(_model(), _Place(ranks - 1, ranks))
    flat = parameters.flat
    whole = shard_map([HeldSet(flat, Mesh(ranks).holders(0))], torch.float64)
    whole.check()
    assert len(whole.tensors) == 3 * len(flat.entries)
    assert whole.num_bytes == 3 * flat.num_elements * 8
    optimizer = ShardedAdamW([parameters], CONFIG)
    assert optimizer.shards[0].master.numel() == -(-flat.num_elements // ranks)


class _Place(Communicator):
    """One place in a group that does not exist: nothing is sent."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


@pytest.mark.parametrize(("hdp", "tp"), [(1, 2), (3, 2), (2, 4), (64, 8)])
def test_map_of_ranks_that_share_a_model_covers_every_tensor_once(hdp: int, tp: int) -> None:
    maps = []
    config = ModelConfig(hidden=32, layers=1, heads=8, kv_heads=8, ffn=40)
    for rank in range(min(hdp * tp, 16)):
        model = Decoder(config, 37)  # no degree divides it
        model.initialize(2)
        tensor = _Place(rank % tp, tp)
        cuts = apply_tensor_parallel(model, DECODER_SHARDING, tensor)
        owners = Owners.of_states(_Place(rank // tp, hdp))
        parameters = ParameterSet(dict(model.named_parameters()), cuts, owners, Sharers(tensor, rank % tp))
        optimizer = ShardedAdamW([parameters], CONFIG)
        maps.append(shard_map([HeldSet(parameters.flat, Mesh(hdp, tp).holders(0))], torch.float32))
        assert local_tensors(
            maps[-1], rank, optimizer.owned_state()
        )  # refuses what is missing, unknown, or of another size
    maps[0].check()
    assert len({each.digest() for each in maps}) == 1
    norms = [shard for name, t in maps[0].tensors.items() if name.endswith("norm.weight") for shard in t.shards]
    assert all(len(shard.ranks) == tp for shard in norms), "what all ranks hold is listed once, with all of them"


def test_parameters_are_views_of_the_flat_buffer_with_their_values() -> None:
    model = _model()
    before = copy.deepcopy(model.state_dict())
    parameters = ParameterSet.whole(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    parameters.owned_values.zero_()
    assert all(parameter.abs().max() == 0 for parameter in model.parameters())
