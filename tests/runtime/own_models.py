"""Small models of transformers, one process that trains them as they are, and ranks that share them."""

import argparse
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import evermesh
from evermesh.parallelism import BatchPlan, CostModel, Layout
from evermesh.runtime.own_model.module import ParallelModule
from tests.cluster import preload, run_ranks
from tests.oracle import gradient, relative_error

os.environ.setdefault("HF_HUB_OFFLINE", "1")
preload(
    "evermesh.runtime.own_model.module",
    "transformers",
    *(f"transformers.models.{family}.modeling_{family}" for family in ("llama", "qwen3", "mistral", "mixtral", "gpt2")),
)
VOCABULARY = 64
CLIP, LR = 0.05, 0.1
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama tied, with biases": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "mistral with a window": {"model_type": "mistral", "sliding_window": 13},
    "gemma 3 with windows": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 10,
        "sliding_window": 11,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {
        "model_type": "gpt2",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
COST = CostModel(token_s=1e-5, pair_s=1e-7, micro_batch_s=1e-5, piece_s=1e-5, ring_step_s=1e-3, ring_token_s=1e-7)


def make_model(name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **changes: Any) -> Any:
    """A model with random weights that are the same in every process."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**_SIZES, **MODELS[name], **changes}
    torch.manual_seed(3)
    config = AutoConfig.for_model(**settings)
    # grouped products of experts know no float64
    options = {"experts_implementation": "eager"} if name == "mixtral" else {}
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:  # norms and biases that are all one or zero hide mistakes
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


@cache
def _text() -> Tensor:
    """Real text: source of the standard library, byte by byte."""
    return torch.tensor(list(Path(argparse.__file__).read_bytes()), dtype=torch.int64) % VOCABULARY


def documents(lengths: Sequence[int]) -> list[Tensor]:
    """Documents of so many tokens."""
    return [_text()[1000 * number : 1000 * number + length] for number, length in enumerate(lengths)]


def labels(lengths: Sequence[int]) -> list[Tensor]:
    """Labels of ``documents``, of which some are not counted."""
    generator = torch.Generator().manual_seed(5)
    return [
        document.masked_fill(torch.rand(len(document), generator=generator) < 0.1, -100)
        for document in documents(lengths)
    ]


class Outcome(NamedTuple):
    """What one step did."""

    loss: float
    gradients: dict[str, Tensor]
    norm: float
    updated: dict[str, Tensor]


def optimizer_of(parameters: Any) -> torch.optim.AdamW:
    """With an eps that keeps the first update from being the sign of gradients near zero."""
    return torch.optim.AdamW(parameters, lr=LR, eps=1e-3, weight_decay=0.3)


@cache
def expected(name: str, lengths: tuple[int, ...], steps: int = 1) -> Outcome:
    """One process that runs the unmodified model with its own attention on one document at a time, in float64."""
    model = make_model(name)
    optimizer = optimizer_of(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        loss = _loss(model, lengths)
        loss.backward()
        gradients = {key: gradient(parameter).clone() for key, parameter in model.named_parameters()}
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        optimizer.step()
    assert norm > 2 * CLIP, "nothing is clipped"
    updated = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    return Outcome(loss.item(), gradients, norm, updated)


def _loss(model: Any, lengths: tuple[int, ...]) -> Tensor:
    counted = sum(int((label[1:] != -100).sum()) for label in labels(lengths))
    total = torch.zeros((), dtype=torch.float64)
    for document, label in zip(documents(lengths), labels(lengths), strict=True):
        logits = model(input_ids=document.unsqueeze(0), use_cache=False).logits[0, :-1]
        total = total + nn.functional.cross_entropy(logits, label[1:], ignore_index=-100, reduction="sum")
    return total / counted


class Found(NamedTuple):
    """What a rank saw."""

    outcome: Outcome
    """With whole gradients and parameters."""
    plan: BatchPlan


def whole(tensor: Any) -> Tensor:
    """All of a sharded tensor, by torch's own hands. Collective."""
    return tensor.detach().full_tensor().clone()


def parallel_model(name: str, layout: Layout, dtype: torch.dtype = torch.float64, **options: Any) -> ParallelModule:
    """A model of ``make_model`` on the ranks of this process's group. Collective."""
    mesh = evermesh.start(layout, device="cpu", timeout_s=60)
    model = make_model(name, dtype)
    if mesh.world.rank:  # only the weights of rank 0 may count
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    return evermesh.parallelize(model, layout, mesh, **{"cost": COST, **options})


class Case(NamedTuple):
    """What is trained, and how it is spread."""

    model: str
    lengths: tuple[int, ...]
    layout: Layout


def steps_on_rank(rank: int, world_size: int, cases: Sequence[Case]) -> list[Found]:
    """One step of every case on one rank."""
    return [_step(case) for case in cases]


def _step(case: Case) -> Found:
    model = parallel_model(case.model, case.layout)
    optimizer = optimizer_of(model.parameters())
    loss = model.train_batch(documents(case.lengths), labels(case.lengths))
    assert model.plan is not None
    gradients = {key: whole(parameter.grad) for key, parameter in model.named_parameters()}
    norm = model.clip_grad_norm_(CLIP).item()
    optimizer.step()
    updated = {key: whole(parameter) for key, parameter in model.named_parameters()}
    return Found(Outcome(loss, gradients, norm, updated), model.plan)


@cache
def found_by_ranks(cases: tuple[Case, ...]) -> dict[Case, list[Found]]:
    """What every rank saw of every case; the cases have one number of ranks, whose start takes most of the time."""
    of_ranks = run_ranks(cases[0].layout.world_size, steps_on_rank, cases, timeout_s=150)
    return dict(zip(cases, map(list, zip(*of_ranks, strict=True)), strict=True))


def worst(case: Case, found: Sequence[Found]) -> tuple[float, str]:
    """The largest relative error of anything on any rank against one process, and of what it is."""
    right = expected(case.model, case.lengths)
    return max(
        (error, f"{what} on rank {rank}")
        for rank, (outcome, _) in enumerate(found)
        for what, error in differences(outcome, right).items()
    )


def differences(found: Outcome, right: Outcome) -> dict[str, float]:
    """Relative errors of everything."""
    errors = {"loss": abs(found.loss - right.loss) / right.loss, "norm": abs(found.norm - right.norm) / right.norm}
    assert found.gradients.keys() == right.gradients.keys()
    for key in right.gradients:
        errors[f"gradient of {key}"] = relative_error(found.gradients[key], right.gradients[key])
        errors[f"updated {key}"] = relative_error(found.updated[key], right.updated[key])
    return errors
