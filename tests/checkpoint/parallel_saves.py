"""Saves of DeepSpeed in which ranks share a model: tensor and pipeline parallelism, and experts."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.checkpoint.foreign_saves import import_deepspeed, live_state

VOCABULARY, PADDED, HIDDEN, TENSOR = 13, 14, 4, 2
FUSED = (4, 2, 2)
INFO = {
    "universal_checkpoint_version": 0.4,
    "original_vocab_size": VOCABULARY,
    "padded_vocab_size": PADDED,
    "vocabulary_parameter_patterns": [r".*table\.weight"],
    "tp_replicated_parameter_patterns": [r".*norm\.(weight|bias)", r".*out\.bias"],
    "parameter_with_row_parallelism_patterns": [r".*out\.weight", r".*still\.weight"],
    "parameter_with_2_sub_params_cat_dim_0": [r".*gate\.weight"],
    "parameter_with_sub_params": [{"patterns": [r".*qkv\.weight"], "shape": (FUSED, HIDDEN), "partition_dim": 0}],
    "sub_param_shard_widths": {r".*qkv\.weight": [[size // TENSOR] * TENSOR for size in FUSED]},
}
"""As Megatron-DeepSpeed gives it."""


class Case(NamedTuple):
    """One save on four ranks."""

    kind: str
    stage: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.kind}-zero{self.stage}-{self.dtype}"


class Copied(torch.autograd.Function):
    """The same forward, the sum over tensor-parallel ranks backward (Shoeybi et al. 2019, f)."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        summed = gradients[0].contiguous().clone()
        dist.all_reduce(summed, group=TensorGroup.group)
        return summed


class Summed(torch.autograd.Function):
    """The sum forward, the same backward (g of the same paper)."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        summed = x.contiguous().clone()
        dist.all_reduce(summed, group=TensorGroup.group)
        return summed

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def copied(x: Tensor) -> Tensor:
    return Copied.apply(x)


def summed(x: Tensor) -> Tensor:
    return Summed.apply(x)


class TensorGroup:
    """Neighbours are tensor-parallel: what DeepSpeed calls an ``mpu``."""

    group: Any = None

    def __init__(self) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        tensor = [dist.new_group(list(range(first, first + TENSOR))) for first in range(0, world, TENSOR)]
        replicas = [dist.new_group(list(range(first, world, TENSOR))) for first in range(TENSOR)]
        TensorGroup.group, self.data = tensor[rank // TENSOR], replicas[rank % TENSOR]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(TensorGroup.group)

    def get_model_parallel_world_size(self) -> int:
        return TENSOR

    def get_model_parallel_group(self) -> Any:
        return TensorGroup.group

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data)

    def get_data_parallel_group(self) -> Any:
        return self.data


class Table(nn.Module):
    """Rows of a padded vocabulary, divided."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(PADDED // TENSOR, HIDDEN)

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens - dist.get_rank(TensorGroup.group) * (PADDED // TENSOR)
        here = (local >= 0) & (local < PADDED // TENSOR)
        return summed(self.table(local * here) * here[..., None])


class Block(nn.Module):
    """A fused projection, divided; a row-parallel one; fused halves; a frozen weight; replicas."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        fused = sum(FUSED) // TENSOR
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, fused, bias=False)
        self.out = nn.Linear(fused, HIDDEN)
        self.gate = nn.Linear(HIDDEN, 6, bias=False)
        self.still = nn.Linear(3, HIDDEN, bias=False)
        self.register_buffer("scale", torch.tensor([0.5, 1.5]))
        rank = dist.get_rank(TensorGroup.group)
        for index, (name, parameter) in enumerate(self.named_parameters()):
            is_same = name.startswith("norm") or name == "out.bias"
            generator = torch.Generator().manual_seed(10 * index + (0 if is_same else rank))
            parameter.data.normal_(generator=generator)
        self.still.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = x + summed(nn.functional.linear(torch.tanh(self.qkv(copied(x))), self.out.weight)) + self.out.bias
        a, b = self.gate(copied(x)).chunk(2, -1)
        return x + summed(self.still(torch.tanh(a) * b)) * self.scale.sum()


def loss(x: Tensor, _: Any = None) -> Tensor:
    """Of the last layer."""
    return x.float().square().mean() + x.float().logsumexp(-1).mean()


class Whole(nn.Module):
    """Without a pipeline."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second = Table(), Block(), Block()

    def forward(self, tokens: Tensor) -> Tensor:
        return loss(self.second(self.first(self.words(tokens))))


class Tied(nn.Module):
    """An embedding that is a head too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(VOCABULARY, 5, generator=torch.Generator().manual_seed(1)))

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.embedding(tokens, self.weight)


def head(tied: Tied, x: Tensor) -> Tensor:
    """The other use of it."""
    return x @ tied.weight.t()


class Odd(nn.Module):
    """Odd sizes, a frozen weight, a buffer."""

    scale: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.still = nn.Linear(5, size), nn.Linear(size, 5, bias=False)
        self.still.weight.requires_grad_(False)
        self.register_buffer("scale", torch.tensor([0.5, 1.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.still(torch.tanh(self.up(x))) * self.scale.sum()


def _expert() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5, bias=False))


class Experts(nn.Module):
    """Two layers of experts, four and two of them."""

    def __init__(self) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.words = nn.Embedding(VOCABULARY, 5)
        self.many = MoE(5, _expert(), num_experts=4, ep_size=2, k=1, capacity_factor=4.0)
        self.few = MoE(5, _expert(), num_experts=2, ep_size=2, k=1, capacity_factor=4.0, use_residual=True)
        for name, parameter in self.named_parameters():
            if "deepspeed_experts" in name:  # of their own on every rank of a group
                generator = torch.Generator().manual_seed(len(name) + 100 * (dist.get_rank() % 2))
                parameter.data.normal_(generator=generator)
            if ".0.bias" in name and "few" in name:
                parameter.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens)
        y, one, _ = self.many(x)
        z, two, _ = self.few(x + y)
        return loss(z) + 0.01 * (one + two)


def save_parallel(rank: int, ranks: int, folder: str, cases: Iterable[Case]) -> None:
    """Train and save every case under its name, with ``live-RANK.pt``: what the rank's optimizer held, under its names."""
    deepspeed = import_deepspeed(rank)
    for case in cases:
        directory = Path(folder) / case.name
        engine, step = _MAKERS[case.kind](deepspeed, case)
        for _ in range(2):
            step()
        client = {} if case.kind in ("experts", "tied") else {"universal_checkpoint_info": INFO}
        engine.save_checkpoint(str(directory), client_state=client)
        torch.save(live_state(engine, ("exp_avg", "exp_avg_sq"), case.stage), directory / f"live-{rank}.pt")


def _config(case: Case, micro_batches: int = 1) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case.dtype == "bfloat16"},
    }


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1, "name": "matrices"},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "name": "vectors"},
    ]


Made = tuple[Any, Callable[[], Any]]


def _tensor(deepspeed: Any, case: Case) -> Made:
    mpu = TensorGroup()
    torch.manual_seed(dist.get_rank(TensorGroup.group))
    model = Whole()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(_groups(model), lr=0.01),
        config=_config(case),
        mpu=mpu,
        dist_init_required=False,
    )
    return engine, _stepping(engine, mpu.get_data_parallel_rank())


def _experts(deepspeed: Any, case: Case) -> Made:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    torch.manual_seed(0)
    model = Experts().to(getattr(torch, case.dtype))
    groups = split_params_into_different_moe_groups_for_optimizer(_groups(model))
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(groups, lr=0.01), config=_config(case), dist_init_required=False
    )
    return engine, _stepping(engine, dist.get_rank())


def _stepping(engine: Any, seed: int) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(seed)

    def step() -> None:
        engine.backward(engine(torch.randint(VOCABULARY, (4, 3), generator=generator)))
        engine.step()

    return step


def _pipeline(deepspeed: Any, case: Case, layers: list[Any], tensor: int) -> Made:
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    world = dist.get_world_size()
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=tensor, num_dp=world // 2 // tensor)
    model = PipelineModule(
        layers, topology=topology, loss_fn=loss, partition_method="uniform", activation_checkpoint_interval=0
    )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(_groups(model), lr=0.01),
        config=_config(case, 2) | {"pipeline": {"pipe_partitioned": False, "grad_partitioned": False}},
        dist_init_required=False,
    )
    generator = torch.Generator().manual_seed(engine.grid.get_data_parallel_rank())

    def batches() -> Any:
        while True:
            yield torch.randint(VOCABULARY, (1, 3), generator=generator), torch.zeros(1)

    endless = batches()
    return engine, lambda: engine.train_batch(endless)


def _both(deepspeed: Any, case: Case) -> Made:
    from deepspeed.pipe import LayerSpec

    TensorGroup()
    torch.manual_seed(dist.get_rank(TensorGroup.group))
    return _pipeline(deepspeed, case, [LayerSpec(kind) for kind in (Table, Block, Block, nn.Identity)], TENSOR)


def _tied(deepspeed: Any, case: Case) -> Made:
    from deepspeed.pipe import LayerSpec, TiedLayerSpec

    torch.manual_seed(0)
    ends = [TiedLayerSpec("ends", Tied, **end, tied_weight_attr="weight") for end in ({}, {"forward_fn": head})]
    middle = [LayerSpec(Odd, 11), LayerSpec(Odd, 7), LayerSpec(nn.LayerNorm, 5)]
    return _pipeline(deepspeed, case, [ends[0], *middle, ends[1]], 1)


_MAKERS: dict[str, Callable[[Any, Case], Made]] = {
    "experts": _experts,
    "tensor": _tensor,
    "pipeline-tensor": _both,
    "tied": _tied,
}
