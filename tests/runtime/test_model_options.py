"""What makes the decoder that of other families never changes what parallelism computes."""

from typing import Any

import pytest
import torch

from evermesh.parallelism import Layout, plan_batch
from evermesh.runtime.model.config import Llama3Rope, ModelConfig
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.sharding import DECODER_SHARDING
from tests.oracle import plain_attention, relative_error
from tests.runtime.parity import COST, MODEL, VOCABULARY, recomputed, worst_error

LENGTHS = (1, 97, 40, 13, 2, 61)
EVERYTHING = MODEL.model_copy(
    update={
        "head_dim": 12,
        "qk_norm": True,
        "qkv_bias": True,
        "tied_embeddings": True,
        "sliding_window": 19,
        "window_layers": (1,),
        "rope_scaling": Llama3Rope(factor=4.0, original_positions=64),
    }
)
"""Every option that goes with the others; layer 0 attends to all, layer 1 to a window."""
PARALLEL_BLOCK = MODEL.model_copy(update={"parallel_block": True, "qkv_bias": True, "sliding_window": 7})


def _error(config: ModelConfig, hdp: int, tp: int, *, recompute: bool = False) -> float:
    plan = plan_batch(LENGTHS, Layout(hdp=hdp, tp=tp, capacity=max(41, -(-97 // hdp))), COST)
    return worst_error(recomputed(plan) if recompute else plan, "float64", config, tp)


@pytest.mark.parametrize(("config", "hdp", "tp"), [(EVERYTHING, 2, 2), (PARALLEL_BLOCK, 3, 1), (PARALLEL_BLOCK, 1, 2)])
def test_gradients_with_options_equal_one_process(config: ModelConfig, hdp: int, tp: int) -> None:
    assert _error(config, hdp, tp) <= 1e-9


@pytest.mark.parity
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", [EVERYTHING, PARALLEL_BLOCK])
@pytest.mark.parametrize(("hdp", "tp"), [(1, 1), (3, 1), (4, 1), (1, 2), (2, 2), (3, 2), (4, 2)])
def test_gradients_with_options_on_the_wide_matrix(config: ModelConfig, hdp: int, tp: int, recompute: bool) -> None:
    assert _error(config, hdp, tp, recompute=recompute) <= 1e-9


def test_every_parameter_with_options_has_one_rule() -> None:
    for config in (EVERYTHING, PARALLEL_BLOCK):
        shapes = {name: parameter.shape for name, parameter in Decoder(config, VOCABULARY).named_parameters()}
        cuts = DECODER_SHARDING.cuts(shapes, 2)
        replicated = {name for name, cut in cuts.items() if cut.dim is None}
        assert replicated == {name for name in shapes if name.endswith("norm.weight")}
        assert "head.weight" not in shapes or not config.tied_embeddings


def test_initial_biases_are_zero_and_one_matrix_is_embedding_and_head() -> None:
    model = Decoder(EVERYTHING, VOCABULARY)
    model.initialize(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.all(parameter == (0.0 if name.endswith(".bias") else 1.0))
    assert model.head.weight is model.embedding.weight


def test_a_parallel_block_adds_attention_and_feed_forward_of_one_norm() -> None:
    model = Decoder(PARALLEL_BLOCK.model_copy(update={"layers": 1}), VOCABULARY).double()
    model.initialize(2)
    tokens = torch.arange(11)
    x = model.embedding(tokens)
    block = model.blocks["0"]
    captured: dict[str, tuple[Any, ...]] = {}
    block.register_forward_pre_hook(lambda _, arguments: captured.update(arguments=arguments))
    logits = model(tokens, tokens, plain_attention)
    normed = torch.nn.functional.rms_norm(x, x.shape[-1:], block.get_parameter("input_norm.weight"), 1e-5)
    _, rotation, attend, _ = captured["arguments"]
    attention, feed_forward = block.get_submodule("attention"), block.get_submodule("feed_forward")
    expected = x + attention(normed, rotation, attend) + feed_forward(normed)
    assert relative_error(logits, model.head(model.norm(expected))) <= 1e-14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 7}, "head_dim = 7 is odd"),
        ({"window_layers": [0]}, "sliding_window is not set"),
        ({"sliding_window": 4, "window_layers": [0, 9]}, "layers 0 to 3"),
        ({"sliding_window": 0}, "greater than 0"),
        ({"rope_scaling": {"kind": "dynamic", "factor": 2.0}}, "'linear', 'llama3', 'yarn'"),
        ({"rope_scaling": {"kind": "llama3", "factor": 2.0, "low_freq_factor": 4.0}}, "is not above low_freq_factor"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(changes)
