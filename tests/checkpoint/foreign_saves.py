"""Checkpoints that other libraries write in the tests, and what these held in memory at that moment."""

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

STEPS = 2


class Tiny(nn.Module):
    """Odd sizes, tied and frozen weights, buffers."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.embedding = nn.Embedding(13, 5)
        self.up = nn.Linear(5, 11)
        self.frozen = nn.Linear(11, 7, bias=False)
        self.down = nn.Linear(7, 5, bias=False)
        self.gain = nn.Parameter(torch.empty(1))
        self.head = nn.Linear(5, 13, bias=False)
        self.register_buffer("scale", torch.tensor([0.5, 1.5, 2.5]))
        self.register_buffer("count", torch.tensor(3))
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.head.weight = self.embedding.weight
        self.frozen.weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y = self.down(self.frozen(torch.tanh(self.up(x)))) * self.gain + self.scale.sum().to(x.dtype)
        return self.head(x + y).float().logsumexp(-1).square().mean()


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023; its only state is exp_avg, and it counts nothing."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.sign(0.9 * average + 0.1 * p.grad))
                average.mul_(0.99).add_(p.grad, alpha=0.01)


OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any], tuple[str, ...]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95)}, ("exp_avg", "exp_avg_sq")),
    "sgd": (torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}, ("momentum_buffer",)),
    "lion": (Lion, {"lr": 0.01}, ("exp_avg",)),
}


class Case(NamedTuple):
    """One save of DeepSpeed."""

    stage: int
    optimizer: str = "adamw"
    dtype: str = "float32"
    zero: tuple[tuple[str, Any], ...] = ()
    """Further options of ZeRO."""
    steps: int = STEPS

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join((f"zero{self.stage}", self.optimizer, self.dtype, *(k for k, _ in self.zero), str(self.steps)))


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups with settings of their own: matrices, and the rest."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0, "lr": 0.003},
    ]


def import_deepspeed(rank: int) -> Any:
    """The library, for a rank of a process group on CPUs."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("LOCAL_RANK", str(rank))
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled in minutes otherwise
    deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def save_deepspeed(rank: int, ranks: int, folder: str, cases: Iterable[Case]) -> None:
    """Train and save every case in ``folder`` under its name, with ``live.pt``: what the optimizer held."""
    deepspeed = import_deepspeed(0)
    for case in cases:
        directory = Path(folder) / case.name
        engine = _trained(deepspeed, case, rank)
        client = {"iteration": 3, "args": argparse.Namespace(hidden=5, sizes=(1, 2)), "random": torch.get_rng_state()}
        engine.save_checkpoint(str(directory), client_state=client)
        live = live_state(engine, states_of(case), case.stage)
        if rank == 0:
            torch.save(live, directory / "live.pt")


def _trained(deepspeed: Any, case: Case, rank: int) -> Any:
    engine = engine_of(deepspeed, case)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(case.steps):
        engine.backward(engine(torch.randint(13, (2, 3), generator=generator)))
        engine.step()
    return engine


def engine_of(deepspeed: Any, case: Case, **more: Any) -> Any:
    """An engine that has not trained; ``more`` is added to its configuration."""
    make, settings, _ = OPTIMIZERS[case.optimizer]
    model = Tiny().to(getattr(torch, case.dtype))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": case.stage, "stage3_param_persistence_threshold": 0} | dict(case.zero),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case.dtype == "bfloat16"},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 5}},
        **more,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=make(groups_of(model), **settings), config=config, dist_init_required=False
    )
    return engine


def states_of(case: Case) -> tuple[str, ...]:
    """What the optimizer keeps of every parameter."""
    return OPTIMIZERS[case.optimizer][2] if case.steps else ()


def live_state(engine: Any, kinds: Iterable[str], stage: int) -> dict[str, Tensor]:
    """The masters and the states of the optimizer, gathered by the library itself. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if stage < 3:  # it links the states of the first group only, before those of the others exist
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        found[f"parameter.{name}"] = safe_get_full_fp32_param(parameter).detach().cpu().clone()
        for kind in kinds:
            found[f"{kind}.{name}"] = safe_get_full_optimizer_state(parameter, kind).detach().cpu().clone()
    return found
