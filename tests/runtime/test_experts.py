"""The mixture of experts on one device against the formulas written out token by token."""

from typing import Any

import pytest
import torch
from torch import Tensor

from evermesh.parallelism.batch_plan import MicroBatch, Piece
from evermesh.parallelism.experts.balance import moved_bias
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.runtime.memory.policy import recompute_activations
from evermesh.runtime.model.config import ModelConfig, MoeConfig
from evermesh.runtime.model.decoder import Decoder, keep_activations
from evermesh.runtime.model.experts import (
    Experts,
    MixtureOfExperts,
    Router,
    grouped_linear,
)
from evermesh.runtime.model.sharding import DECODER_EXPERTS, DECODER_SHARDING
from tests.oracle import gradient, plain_attention, relative_error

HIDDEN = 16
KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {"experts": 8, "top_k": 2, "ffn": 24},
    "Qwen3-MoE": {"experts": 6, "top_k": 3, "ffn": 12, "normalise_weights": True},
    "Qwen2-MoE": {
        "experts": 6,
        "top_k": 2,
        "ffn": 12,
        "normalise_weights": False,
        "shared_ffn": 20,
        "shared_gate": True,
    },
    "DeepSeek-V3": {
        "experts": 8,
        "top_k": 2,
        "ffn": 8,
        "shared_ffn": 8,
        "router": "sigmoid",
        "groups": 4,
        "top_groups": 2,
        "scale": 2.5,
        "balancing": {"kind": "bias", "rate": 0.01},
    },
}


def _mixture(**changes: Any) -> MixtureOfExperts:
    from evermesh.runtime.model.blocks import FeedForward

    config = MoeConfig.model_validate({"experts": 4, "ffn": 8, **changes})
    torch.manual_seed(0)
    shared = FeedForward(HIDDEN, config.shared_ffn) if config.shared_ffn else None
    mixture = MixtureOfExperts(HIDDEN, config, 3, shared).double()
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return mixture


def _by_hand(mixture: MixtureOfExperts, x_TC: Tensor) -> Tensor:
    """One token, one expert at a time."""
    config, experts = mixture.config, mixture.experts
    out = []
    for x in x_TC:
        logits = mixture.router.weight @ x
        scores = logits.softmax(0) if config.router == "softmax" else 1 / (1 + (-logits).exp())
        ranked = (scores.detach() + mixture.router.bias_E).tolist()
        size = config.experts // config.groups
        groups = [range(group * size, (group + 1) * size) for group in range(config.groups)]
        best = sorted(groups, key=lambda group: -sum(sorted(ranked[e] for e in group)[-2:]))[: config.top_groups]
        chosen = sorted((e for group in best for e in group), key=lambda e: -ranked[e])[: config.top_k]
        total = sum(scores[e] for e in chosen) if config.normalise_weights else 1.0
        y = torch.zeros_like(x)
        for e in chosen:
            inner = torch.nn.functional.silu(experts.gate[e] @ x) * (experts.up[e] @ x)
            y = y + config.scale * scores[e] / total * (experts.down[e] @ inner)
        if mixture.shared is not None:
            gate = mixture.shared_gate(x).sigmoid() if mixture.shared_gate is not None else 1.0
            y = y + gate * mixture.shared(x.unsqueeze(0))[0]
        out.append(y)
    return torch.stack(out)


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_equal_the_formula_token_by_token(kind: str) -> None:
    mixture = _mixture(**KINDS[kind]).eval()  # in training the bias needs documents to count
    if mixture.config.balancing.kind == "bias":
        mixture.router.bias_E += torch.linspace(-0.2, 0.2, mixture.config.experts).double()
    x = torch.randn(19, HIDDEN, dtype=torch.float64)
    results = []
    for run in (mixture, lambda x: _by_hand(mixture, x)):
        mixture.zero_grad()
        own = x.clone().requires_grad_()
        out = run(own)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out.detach(), gradient(own), *map(gradient, mixture.parameters())])
    assert max(relative_error(a, b) for a, b in zip(*results, strict=True)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("counts", [(0, 0, 0), (5, 0, 3), (0, 7, 0)])
@pytest.mark.parametrize("sizes", [(16, 24), (7, 5)])
def test_grouped_products_equal_one_product_per_expert(
    dtype: torch.dtype, counts: tuple[int, ...], sizes: tuple[int, int]
) -> None:
    torch.manual_seed(1)
    rows = torch.randn(sum(counts), sizes[0]).to(dtype).requires_grad_()
    weights = torch.randn(3, sizes[1], sizes[0]).to(dtype).requires_grad_()
    grouped_linear(rows, weights, counts).sum().backward()  # the gradient of a sum is expanded
    got = gradient(rows).double(), gradient(weights).double()
    own, all_ = rows.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    torch.cat([part @ weight.T for part, weight in zip(own.split(counts), all_, strict=True)]).sum().backward()
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert torch.allclose(got[0], gradient(own), rtol=tolerance, atol=tolerance)
    assert torch.allclose(got[1], gradient(all_), rtol=tolerance, atol=tolerance * 10)


def test_a_mixture_without_tokens_has_gradients_that_are_zero() -> None:
    mixture = _mixture()
    mixture(torch.empty(0, HIDDEN, dtype=torch.float64)).sum().backward()
    assert all(gradient(parameter).abs().sum() == 0 for parameter in mixture.experts.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_bias_stay_precise_whatever_the_type_of_the_model(dtype: torch.dtype) -> None:
    router = Router(HIDDEN, MoeConfig(experts=4, ffn=8))
    torch.nn.init.normal_(router.weight)
    router.bias_E += 1e-9
    router = router.to(dtype)
    assert router.bias_E.dtype == torch.float64
    assert router.bias_E[0].item() == 1e-9
    assert router(torch.randn(3, HIDDEN).to(dtype)).weights_TK.dtype == torch.float32


CONFIG = ModelConfig(
    hidden=HIDDEN,
    layers=4,
    heads=2,
    kv_heads=2,
    ffn=24,
    moe=MoeConfig(experts=4, ffn=8, shared_ffn=12, shared_gate=True, first_dense_layers=1, period=2),
)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_the_document_loss_and_its_gradient_equal_the_formula(router: str) -> None:
    """Sum over experts of f P for every document, weighted by its tokens (DeepSeek-V3, equations 17 to 20)."""
    balancing = {"kind": "document_loss", "coefficient": 0.3}
    mixture, lengths, batch_tokens = _mixture(router=router, balancing=balancing), (7, 4), 20
    pieces = tuple(Piece(index, ((0, length),), (0,)) for index, length in enumerate(lengths))
    context = TokenContext(MicroBatch(pieces), lengths, ("a", "b"), batch_tokens)
    x = torch.randn(sum(lengths), HIDDEN, dtype=torch.float64)
    (0.01 * mixture(x, context)).sum().backward()
    got = [gradient(parameter) for parameter in mixture.parameters()]
    mixture.zero_grad()
    loss = torch.zeros((), dtype=torch.float64)
    for of_document in x.split(lengths):
        logits = of_document @ mixture.router.weight.T
        scores = logits.softmax(-1) if router == "softmax" else logits.sigmoid()
        chosen = scores.topk(2).indices.flatten()
        length, shares = len(of_document), scores / scores.sum(-1, keepdim=True)
        of_experts = [(chosen == e).double().sum() * 4 / (2 * length) * shares[:, e].mean() for e in range(4)]
        loss = loss + 0.3 * length / batch_tokens * torch.stack(of_experts).sum()
    ((0.01 * _by_hand(mixture, x)).sum() + loss).backward()
    wanted = [gradient(parameter) for parameter in mixture.parameters()]
    assert max(relative_error(a, b) for a, b in zip(got, wanted, strict=True)) <= 1e-12
    assert abs(context.losses[3].item() - loss.item()) <= 1e-12


def test_layers_with_experts_are_those_that_the_configuration_names() -> None:
    assert [CONFIG.has_experts(layer) for layer in range(4)] == [False, False, True, False]
    model = Decoder(CONFIG, 31)
    assert [block.mixture is not None for block in model.blocks.values()] == [False, False, True, False]
    assert [block.feed_forward is not None for block in model.blocks.values()] == [True, True, False, True]


def test_only_active_experts_count_as_work() -> None:
    """2 FLOPs for every weight that a token meets."""
    model = Decoder(CONFIG, 31)
    assert CONFIG.moe is not None
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mixture.experts." in name)
    met = sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embedding" not in name)
    met -= experts * (CONFIG.moe.experts - CONFIG.moe.top_k) // CONFIG.moe.experts
    met -= HIDDEN  # the gate of the shared expert, one output wide, is left out
    assert CONFIG.shape(31).linear_flops_per_token() == 2 * met


def test_recomputation_gives_the_same_bits_and_counts_loads_once() -> None:
    moe = MoeConfig.model_validate({"experts": 4, "ffn": 8, "balancing": {"kind": "document_loss", "coefficient": 0.1}})
    model = Decoder(CONFIG.model_copy(update={"moe": moe}), 31)
    model.initialize(1)
    results = []
    for run_block in (keep_activations, recompute_activations):
        model.zero_grad()
        context = TokenContext(MicroBatch((Piece(0, ((0, 9),), (0,)),)), (9,), ("a",), 9)
        logits = model(
            torch.arange(9),
            torch.arange(9),
            plain_attention,
            run_block=run_block,
            context=context,
        )
        logits.square().sum().backward()
        assert {layer: load.sum().item() for layer, load in context.loads.items()} == dict.fromkeys(range(4), 18)
        results.append([logits.detach(), *map(gradient, model.parameters()), *context.losses.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_every_parameter_has_one_rule_and_experts_are_cut_by_their_own() -> None:
    shapes = {name: parameter.shape for name, parameter in Decoder(CONFIG, 31).named_parameters()}
    dense, experts = DECODER_SHARDING.cuts(shapes, 2), DECODER_EXPERTS.cuts(shapes, 2, 2)
    assert dense.keys() | experts.keys() == shapes.keys()
    assert not dense.keys() & experts.keys()
    assert {name.rpartition(".")[2] for name in experts} == {"gate", "up", "down"}
    assert dense["blocks.2.mixture.router.weight"].dim is None


def test_biases_move_against_the_load_by_one_step() -> None:
    moved = moved_bias(torch.zeros(8, dtype=torch.float64), torch.tensor([9, 1, 4, 4, 4, 4, 4, 2]), 0.01)
    assert moved.tolist() == [-0.01, 0.01, 0, 0, 0, 0, 0, 0.01]


def test_bias_balancing_evens_out_a_router_that_prefers_few_experts() -> None:
    mixture = _mixture(experts=8, top_k=2, router="sigmoid", balancing={"kind": "bias", "rate": 0.01})
    with torch.no_grad():
        mixture.router.weight[:, 0] = torch.linspace(4, -4, 8)
    x = torch.randn(512, HIDDEN, dtype=torch.float64)
    x[:, 0] = 1.0
    ratios = []
    for _ in range(250):
        counts = torch.bincount(mixture.router(x).chosen_TK.flatten(), minlength=8)
        ratios.append((counts.max() / counts.double().mean()).item())
        mixture.router.bias_E = moved_bias(mixture.router.bias_E, counts, 0.01)
    assert ratios[0] > 3
    assert sum(ratios[-20:]) / 20 < 1.25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "more than the 4 experts"),
        ({"groups": 3}, "not a multiple of groups"),
        ({"groups": 2, "top_groups": 3}, "more than groups"),
        ({"groups": 2, "top_groups": 1, "top_k": 3}, "more than the 2 experts"),
        ({"shared_gate": True}, "set shared_ffn"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoeConfig.model_validate({"experts": 4, "ffn": 8, **changes})


def test_a_model_whose_layers_are_all_dense_in_spite_of_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="the first would be layer 4 of 2"):
        ModelConfig(layers=2, moe=MoeConfig(experts=4, ffn=8, period=4))


@pytest.mark.parametrize(
    "changes",
    [{"capacity_factor": 1.0}, {"balancing": {"kind": "document_loss"}}, {"balancing": {"kind": "bias"}}],
)
def test_balancing_needs_documents_to_count(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="was given no documents"):
        _mixture(**changes)(torch.zeros(2, HIDDEN, dtype=torch.float64))


def test_experts_take_rows_of_any_count() -> None:
    experts = Experts(3, HIDDEN, 8)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    assert experts(torch.zeros(4, HIDDEN), [0, 4, 0]).shape == (4, HIDDEN)
