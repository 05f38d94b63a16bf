"""What would train another model than the one that was given is refused before it trains, with the fact and the way out."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from evermesh.parallelism import Communicator, Layout, LayoutDoesNotFit
from evermesh.parallelism.tiers import Tiers
from evermesh.runtime.errors import BatchInvalid, UnsupportedModel
from evermesh.runtime.own_model.attention import attention_forward
from evermesh.runtime.own_model.documents import Documents
from evermesh.runtime.own_model.examining import check_layout, decoder_layers, examine, text_config
from evermesh.runtime.own_model.tensor import TensorParallelModel
from tests.runtime.own_models import MODELS, make_model

ALONE = Layout(capacity=512)


def _examine(name: str, layout: Layout = ALONE, **changes: Any) -> Any:
    model = make_model(name, **changes)
    return examine(model, text_config(model), layout)


@pytest.mark.parametrize("name", MODELS)
def test_models_that_can_be_trained_pass_and_their_layers_are_found(name: str) -> None:
    slot = _examine(name)
    assert slot.attend is None
    model = make_model(name)
    assert len(decoder_layers(model)) == model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("axis", "layout"),
    [
        ("pp", Layout(hdp=2, tp=2, pp=2)),
        ("ep", Layout(hdp=4, ep=2)),
        ("etp", Layout(hdp=4, etp=2)),
        ("activations", Layout(activations="offload", offload=0.5)),
        ("tp_chunks", Layout(tp=2, tp_chunks=2)),
        ("sharding", Layout(hdp=2, sharding=Tiers(gradients="all"))),
    ],
)
def test_axes_that_are_not_there_for_such_a_model_are_refused(axis: str, layout: Layout) -> None:
    with pytest.raises(LayoutDoesNotFit, match=rf"layout\.{axis} is") as failure:
        check_layout(layout)
    assert failure.value.axis == axis


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("gpt2", {"resid_pdrop": 0.1}, "has dropout .transformer.h.0.attn.resid_dropout 0.1"),
        ("llama", {"attention_dropout": 0.1}, "asks its attention for dropout 0.1"),
        ("mixtral", {"output_router_logits": True}, "auxiliary loss of its routers"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary positions of type dynamic",
        ),
    ],
)
def test_what_would_depend_on_the_packing_is_refused(name: str, changes: dict[str, Any], said: str) -> None:
    model = make_model(name, **changes).train()
    with pytest.raises(UnsupportedModel, match=said):
        examine(model, text_config(model), ALONE)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "soft caps": (
        {"model_type": "gemma2", "head_dim": 16, "attn_logit_softcapping": 50.0},
        "Gemma2Attention asks its attention for softcap",
    ),
    "chunked attention": (
        {"model_type": "llama4_text", "num_local_experts": 2, "head_dim": 16, "intermediate_size_mlp": 48},
        "layers of chunked_attention",
    ),
    "linear attention": (
        {
            "model_type": "qwen3_next",
            "head_dim": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        "layers of linear_attention",
    ),
    "attention of its own": ({"model_type": "bloom", "n_head": 4}, "attention"),
    "no attention at all": ({"model_type": "mamba", "state_size": 4}, "attention"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_attention_that_packs_and_rings_do_not_know_is_refused(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, said = OTHERS[what]
    monkeypatch.setitem(MODELS, what, settings)
    with pytest.raises(UnsupportedModel, match=said):
        _examine(what, attention="eager")


def test_a_model_whose_layers_leave_the_registry_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UnsupportedModel, match="asked the registry for attention 1 times in 2 layers"):
        examine(model, text_config(model), ALONE)


def test_a_window_that_only_the_mask_would_have_known_is_refused() -> None:
    model = make_model("llama")
    model.config.sliding_window = 13  # read by the function that makes masks, which is never asked
    with pytest.raises(UnsupportedModel, match="a window of None tokens, its configuration says 13"):
        examine(model, text_config(model), ALONE)


def test_a_module_of_somebody_else_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Linear is no model of transformers"):
        text_config(nn.Linear(2, 2))


def test_our_attention_outside_of_a_step_is_an_error_and_not_another_attention() -> None:
    model = make_model("llama")
    examine(model, text_config(model), ALONE)
    with pytest.raises(UnsupportedModel, match="outside of a training step"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.int64))
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(UnsupportedModel, match=r"was not given to evermesh\.parallelize"):
        attention_forward(nn.Linear(2, 2), x, x, x, None)


class _Ranks(Communicator):
    """Four ranks that are asked for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 4


@pytest.mark.parametrize(
    ("name", "changes", "error", "said"),
    [
        ("gpt2", {}, UnsupportedModel, "declares no plan"),
        ("mixtral", {"num_key_value_heads": 4}, UnsupportedModel, "mlp.experts as 'moe_tp_experts'"),
        ("qwen3", {}, LayoutDoesNotFit, "does not divide num_key_value_heads 2"),
        ("llama", {"num_key_value_heads": 4, "intermediate_size": 50}, LayoutDoesNotFit, "intermediate_size 50"),
    ],
)
def test_tensor_parallelism_without_a_fitting_plan_is_refused(
    name: str, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    model, mesh = make_model(name, **{"num_attention_heads": 4, **changes}), object()
    with pytest.raises(error, match=said):
        TensorParallelModel(model, text_config(model), _Ranks(), mesh)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "labels"),
    [
        ([], None),
        ([torch.ones(1, dtype=torch.int64)], None),
        ([torch.ones(4)], None),
        ([torch.ones(2, 2, dtype=torch.int64)], None),
        ([torch.ones(4, dtype=torch.int64)], [torch.ones(3, dtype=torch.int64)]),
        ([torch.ones(4, dtype=torch.int64)], []),
    ],
)
def test_documents_with_nothing_to_predict_are_refused(tokens: list[torch.Tensor], labels: Any) -> None:
    with pytest.raises(BatchInvalid):
        Documents(tokens, labels)


def test_without_transformers_the_error_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch, evermesh\n"
        "from evermesh.runtime.own_model.examining import text_config\n"
        "text_config(torch.nn.Linear(2, 2))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "pip install 'evermesh[hf]'" in done.stderr
