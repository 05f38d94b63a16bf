"""The decoder against transformers' conventions written out, and its independence of everything but the seed."""

import pytest
import torch
from torch import Tensor

from evermesh.parallelism import CostModel, Layout
from evermesh.parallelism.cost import Sharing
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.cost import cost_of_shape, nominal_cost, pool_of
from evermesh.runtime.memory.policy import recompute_activations
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.decoder import Decoder, keep_activations
from evermesh.runtime.model.sharding import DECODER_SHARDING
from evermesh.runtime.optimizer_config import AdamWConfig
from tests.oracle import plain_attention, relative_error

CONFIG = ModelConfig(hidden=32, layers=2, heads=4, kv_heads=2, ffn=40)
TRAIN = {"data": {"sources": [{"kind": "stdlib"}]}}


def _model() -> Decoder:
    model = Decoder(CONFIG, 50)
    model.initialize(1)
    return model.double()


def _by_hand(model: Decoder, tokens: Tensor) -> Tensor:
    """LLaMA's forward pass from its paper, with complex numbers for the rotation."""
    weights = dict(model.named_parameters())
    head_dim = CONFIG.hidden // CONFIG.heads
    frequencies = CONFIG.rope_theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    turn = torch.polar(torch.ones(()).double(), torch.arange(len(tokens)).double()[:, None] * frequencies)[:, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + CONFIG.norm_eps).sqrt() * weights[f"{name}.weight"]

    def rotated(x: Tensor) -> Tensor:
        turned = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([turned.real, turned.imag], -1)

    x = weights["embedding.weight"][tokens]
    for layer in range(CONFIG.layers):
        block = f"blocks.{layer}"
        y = norm(x, f"{block}.attention_norm")
        q, k, v = (
            (y @ weights[f"{block}.attention.{n}.weight"].T).unflatten(-1, (-1, head_dim))
            for n in ("query", "key", "value")
        )
        out = plain_attention(rotated(q), rotated(k), v).flatten(1)
        x = x + out @ weights[f"{block}.attention.output.weight"].T
        y = norm(x, f"{block}.feed_forward_norm")
        gate, up, down = (weights[f"{block}.feed_forward.{n}.weight"] for n in ("gate", "up", "down"))
        x = x + (torch.nn.functional.silu(y @ gate.T) * (y @ up.T)) @ down.T
    return norm(x, "norm") @ weights["head.weight"].T


def test_logits_equal_the_paper_written_out() -> None:
    model, tokens = _model(), torch.arange(23) % 50
    logits = model(tokens, torch.arange(23), plain_attention)
    assert relative_error(logits.detach(), _by_hand(model, tokens).detach()) <= 1e-12


def test_recomputation_gives_the_same_bits() -> None:
    model, tokens = _model(), torch.arange(9)
    outputs = []
    for run_block in (keep_activations, recompute_activations):
        model.zero_grad()
        logits = model(tokens, torch.arange(9), plain_attention, run_block=run_block)
        logits.square().sum().backward()
        outputs.append([logits.detach(), *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_weights_depend_on_seed_and_name_alone() -> None:
    torch.manual_seed(99)
    first, second, other = (
        Decoder(CONFIG, 50),
        Decoder(CONFIG.model_copy(update={"layers": 3}), 50),
        Decoder(CONFIG, 50),
    )
    first.initialize(1)
    second.initialize(1)
    other.initialize(2)
    name = "embedding.weight"
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 30, "heads": 4}, "not a multiple of heads"),
        ({"heads": 4, "kv_heads": 3}, "not a multiple of kv_heads"),
        ({"hidden": 12, "heads": 4, "kv_heads": 4}, "rotary embedding needs pairs"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate({"hidden": 32, **changes})


@pytest.mark.parametrize("changes", [{"betas": [0.9, 1.5]}, {"lr": float("inf")}, {"lr": float("nan")}, {"eps": 0.0}])
def test_optimizer_values_that_cannot_train_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        AdamWConfig.model_validate(changes)


def test_every_parameter_of_the_decoder_has_one_rule() -> None:
    shapes = {name: parameter.shape for name, parameter in _model().named_parameters()}
    cuts = DECODER_SHARDING.cuts(shapes, 2)
    replicated = {name for name, cut in cuts.items() if cut.dim is None}
    assert replicated == {name for name, parameter in _model().named_parameters() if parameter.dim() == 1}


def test_the_nominal_cost_of_an_hdp_rank_is_shared_by_its_devices() -> None:
    one, two = (
        nominal_cost(TrainConfig.model_validate(TRAIN | {"layout": {"tp": tp}}), CONFIG.shape(50)) for tp in (1, 2)
    )
    assert one.token_s == 2 * two.token_s
    assert one.pair_s == 2 * two.pair_s
    assert one.ring_token_s == 2 * two.ring_token_s
    assert one.micro_batch_s == two.micro_batch_s


def test_nominal_copies_hide_on_a_gpu_and_are_work_on_a_cpu() -> None:
    shape, layout = CONFIG.shape(50), Layout(activations="offload", offload="auto")
    on_gpu, on_cpu = (cost_of_shape(shape, layout, threads, 4) for threads in (None, 2))
    assert on_gpu.host_token_s > 0
    assert on_gpu.host_products_token_s > 0
    assert on_gpu.offload_saves_token_s == on_gpu.recompute_token_s > 0
    assert on_cpu.host_token_s == on_cpu.host_products_token_s == 0.0
    # nothing hides: all products are moved where that is less work than computing them, or none
    work = on_cpu.work(100, Sharing())
    assert on_cpu.best_offload(work) == float(on_cpu.offload_saves_token_s > 0)
    whole = cost_of_shape(shape, Layout(activations="recompute"), None, 4)
    assert not whole.offloads
    assert 0 < on_gpu.recompute_token_s < whole.recompute_token_s


def test_nodes_count_for_the_planner_where_networks_cost_more() -> None:
    layout, cost = Layout(hdp=4, tp=2), CostModel(token_s=1e-5, pair_s=1e-9, ring_token_s=1e-6)
    nodes = (0, 0, 0, 0, 1, 1, 2, 2)
    assert pool_of(nodes, layout, cost).nodes == (0, 0, 0, 0)
    assert pool_of(nodes, layout, cost.model_copy(update={"network_token_s": 1e-5})).nodes == (0, 0, 1, 2)
